"""The machine: precision, signals, random numbers, and the measures of what a run took."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import FAMILIES, REPOSITORY, refused
from transformers import AutoConfig, AutoModelForCausalLM

from common import run_folder, runtime
from common.config import BaseConfig, DataConfig, ModelConfig, RuntimeConfig, TrainConfig
from common.json_lines import JsonLines, finite
from common.metrics import HostMemory, flops_per_token, peak_flops, peak_gpu_gib
from common.models import load_model
from launchers.gpu_share import share_variables

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# What current builds of torch are made for.
BUILT_FOR = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.fixture
def gpu(monkeypatch):
    """gpu(name, capability, architectures): what torch reports on a machine with that GPU"""

    def pretend(name: str, capability: tuple[int, int], architectures: list[str] = BUILT_FOR) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # a T4 reports it, too

    return pretend


# --- precision and the GPU


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [
        ("Tesla T4", (7, 5), torch.float16),
        ("Tesla P100-PCIE-16GB", (6, 0), torch.float16),
        ("NVIDIA A100-SXM4-40GB", (8, 0), torch.bfloat16),
        ("NVIDIA H200", (9, 0), torch.bfloat16),
        ("NVIDIA B200", (10, 0), torch.bfloat16),
    ],
)
def test_auto_precision_goes_by_compute_capability(gpu, name, capability, dtype):
    gpu(name, capability)
    chosen, reason = runtime.resolve_precision("auto", GPU)
    assert chosen == dtype
    assert name in reason
    assert f"{capability[0]}.{capability[1]}" in reason
    assert reason.startswith("bf16" if dtype == torch.bfloat16 else "fp16")


def test_a_set_precision_is_taken_where_the_gpu_has_it(gpu):
    gpu("Tesla T4", (7, 5))
    with refused("train.precision=bf16", "Tesla T4", "7.5", "train.precision=fp16 or auto"):
        runtime.resolve_precision("bf16", GPU)
    assert runtime.resolve_precision("fp16", GPU)[0] == torch.float16
    assert runtime.resolve_precision("fp32", GPU)[0] == torch.float32
    gpu("NVIDIA A100-SXM4-40GB", (8, 0))
    assert runtime.resolve_precision("bf16", GPU) == (torch.bfloat16, "bf16: as set")


def test_a_cpu_computes_in_fp32_unless_told_otherwise():
    assert runtime.resolve_precision("auto", CPU)[0] == torch.float32
    assert "CPU" in runtime.resolve_precision("auto", CPU)[1]
    assert runtime.resolve_precision("bf16", CPU) == (torch.bfloat16, "bf16: as set")


@pytest.mark.parametrize(
    ("name", "capability", "architectures", "supported"),
    [
        ("Tesla T4", (7, 5), BUILT_FOR, True),
        ("Tesla P100-PCIE-16GB", (6, 0), BUILT_FOR, False),
        ("Tesla P100-PCIE-16GB", (6, 0), ["sm_60", *BUILT_FOR], True),
        ("NVIDIA L4", (8, 9), BUILT_FOR, True),  # machine code of 8.6 runs on 8.9
        ("NVIDIA H200", (9, 0), ["sm_75", "sm_80"], False),  # and that of 8.0 not on 9.0
        ("NVIDIA H200", (9, 0), ["sm_80", "compute_80"], True),  # but its PTX does
        ("NVIDIA A10G", (8, 6), ["sm_89", "compute_89"], False),  # nothing runs on what is older
        ("NVIDIA H200", (9, 0), ["sm_90a"], True),
        ("NVIDIA B200", (10, 0), BUILT_FOR, True),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_refused(gpu, name, capability, architectures, supported):
    gpu(name, capability, architectures)
    if supported:
        runtime.check_gpu(GPU)
    else:
        with refused(name, f"{capability[0]}.{capability[1]}", torch.__version__, architectures[0], "GPU T4 x2"):
            runtime.check_gpu(GPU)
    runtime.check_gpu(CPU)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("Tesla T4", torch.float16, 65),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("Tesla P100-PCIE-16GB", torch.float32, 9.3),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, None),
    ],
)
def test_the_peak_is_the_data_sheet_s(gpu, name, dtype, tflops):
    gpu(name, (8, 0))
    assert peak_flops(GPU, dtype) == (tflops * 1e12 if tflops else None)
    assert peak_flops(CPU, dtype) is None


def test_a_cpu_takes_no_gpu_memory_and_no_limit():
    assert peak_gpu_gib(CPU) == 0.0
    runtime.limit_gpu_memory(RuntimeConfig(gpu_memory_limit_gib=1e9), CPU)


@pytest.mark.parametrize(
    ("micro_batch", "checkpointing", "advice"),
    [
        (4, False, ["train.micro_batch_size=2", "train.activation_checkpointing=true", "data.max_length=128"]),
        (1, False, ["train.activation_checkpointing=true", "data.max_length=128"]),
        (1, True, ["data.max_length=128"]),
    ],
)
def test_out_of_memory_says_what_needs_less(micro_batch, checkpointing, advice):
    train = TrainConfig(micro_batch_size=micro_batch, activation_checkpointing=checkpointing)
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.7 GiB of which\nmuch more"
    tried = f"Tried to allocate 2.00 GiB. Try {', or '.join(advice)}"
    with refused(tried), runtime.explain_out_of_memory(BaseConfig(train=train, data=DataConfig(max_length=256))):
        raise torch.OutOfMemoryError(said)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="something else"), runtime.explain_out_of_memory(BaseConfig()):
        raise RuntimeError("something else")


def test_a_loss_that_is_no_number_stops_the_run():
    runtime.check_finite(3, 2.5, runtime.MOST_SKIPPED_STEPS - 1)
    for loss in (float("nan"), float("inf")):
        with refused(f"step 3 is {loss}", "train.precision", "train.learning_rate", "train.warmup_steps"):
            runtime.check_finite(3, loss, 0)
    with refused("step 3", "5 steps in a row", "train.precision=bf16 or fp32"):
        runtime.check_finite(3, 2.5, 5)


# --- random numbers, signals, environment


def draw() -> list[float]:
    """From each generator; an odd number of Gaussians, so that Python and NumPy each keep one back."""
    return [random.random(), random.gauss(), np.random.rand(), np.random.randn(), *torch.rand(3).tolist()]


def test_the_random_state_comes_back(tmp_path):
    runtime.seed_everything(7)
    draw()
    runtime.save_rng(tmp_path, 0)
    expected = [draw() for _ in range(3)]
    runtime.seed_everything(8)
    draw()
    runtime.load_rng(tmp_path, 1)  # of a rank that there was not: nothing
    runtime.load_rng(tmp_path, 0)
    assert [draw() for _ in range(3)] == expected


def test_a_seed_fixes_every_generator():
    drawn = []
    for seed in (7, 7, 8):
        runtime.seed_everything(seed)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))
    runtime.seed_everything(2**40)  # NumPy takes no seed above 32 bits


@pytest.fixture
def keep_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("keep_handlers")
class TestStopRequest:
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
    def test_a_signal(self, name):
        stop = runtime.StopRequest(RuntimeConfig())
        assert stop.reason is None
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.reason == name

    def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not(self):
        stop = runtime.StopRequest(RuntimeConfig())
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    def test_max_hours(self):
        stop = runtime.StopRequest(RuntimeConfig(max_hours=0.2 / 3600))
        assert stop.reason is None
        time.sleep(0.3)
        assert "runtime.max_hours" in stop.reason
        assert runtime.StopRequest(RuntimeConfig(max_hours=1)).reason is None


@pytest.mark.parametrize(
    ("local_rank", "visible", "gpu"),
    [(0, None, "0"), (1, None, "0"), (2, None, "1"), (3, "4,7", "7"), (1, "4,4,7,7", "4"), (4, "4,7", "")],
)
def test_processes_that_share_gpus_have_one_each(local_rank, visible, gpu):
    launched = {"RANK": str(local_rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "5"}
    launched |= {"GPU_SHARES": "2"} | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    own = share_variables(launched)
    assert own["CUDA_VISIBLE_DEVICES"] == gpu and own["LOCAL_RANK"] == "0"
    assert own["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50" and own["NCCL_SOCKET_IFNAME"] == "lo"
    assert own["NCCL_HOSTID"] != share_variables(launched | {"LOCAL_RANK": str(local_rank + 1)})["NCCL_HOSTID"]
    several_machines = share_variables(launched | {"WORLD_SIZE": "10", "NCCL_SOCKET_NTHREADS": "2"})
    assert not {"NCCL_SOCKET_IFNAME", "NCCL_SOCKET_NTHREADS"} & several_machines.keys()  # what is set stays


def test_a_share_of_a_gpu_that_is_not_there_is_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; from common import runtime; print(*sys.argv[1:]); runtime.check_process_count()")
    variables = {"GPU_SHARES": "2", "LOCAL_RANK": "9", "LOCAL_WORLD_SIZE": "10", "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(
        [sys.executable, REPOSITORY / "launchers/gpu_share.py", script, "a=1"],
        env=os.environ | variables | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "a=1\n"
    assert "no GPU for one of 10 processes, which has 1/2 of GPU 4: set NPROC_PER_NODE lower" in done.stderr


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("GPU_SHARES", "how many processes share a GPU"),
        ("NPROC_PER_NODE", "how many processes to start on this machine"),
    ],
)
def test_launch_says_what_its_variables_take(name, meaning):
    for wrong in ("two", "0", "1/2", "-1"):
        done = subprocess.run(
            ["pytorch-ddp/launch.sh", "--help"],
            cwd=REPOSITORY, env=os.environ | {name: wrong}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == f"error: {name}={wrong}: set it to {meaning}, such as 2\n"


def test_the_environment_is_described_in_json():
    environment = json.loads(json.dumps(runtime.describe_environment(2, "fp32: the default on a CPU")))
    assert environment["world_size"] == 2
    assert environment["precision"].startswith("fp32")
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["host_memory_gib"] == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.1)
    head = subprocess.run(["git", "-C", REPOSITORY, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert environment["git_commit"].startswith(head.stdout.strip())


# --- measures


@pytest.mark.parametrize(("share", "of_a_gpu"), [("", 1), ("1/8 of GPU 0", 1 / 8)])
def test_mfu_is_by_the_peak_of_what_each_process_has_of_a_gpu(tmp_path, monkeypatch, share, of_a_gpu):
    monkeypatch.setattr(run_folder, "peak_flops", lambda device, dtype: 1e12)
    cfg = BaseConfig(output_dir=str(tmp_path))
    cfg.tracking.backend = "none"
    model = load_model(ModelConfig("tiny:llama"))
    with run_folder.RunFolder(cfg, "project", True, {"world_size": 2, "gpu_share": share}) as run:
        run.begin(model, CPU, torch.float32, 0, 1, None)
        run.log_step(1, seconds=0.5, tokens=10_000, epoch=1.0, loss=2.0, learning_rate=0.1, grad_norm=1.0)
        summary = run.summarize("completed")
    assert summary["mfu"] == pytest.approx(20_000 * summary["flops_per_token"] / (2e12 * of_a_gpu), abs=1e-4)


def run_of(folder: Path, first_step: int, steps: int, checkpoint: Path | None = None, loss: float = 2.0) -> dict:
    """A run's records from `first_step` to `steps`, without a held-out loss after step 0; its summary."""
    cfg = BaseConfig(output_dir=str(folder))
    cfg.tracking.backend = "none"
    model = load_model(ModelConfig("tiny:llama"))
    with run_folder.RunFolder(cfg, "project", True, {"world_size": 1}) as run:
        run.begin(model, CPU, torch.float32, first_step, steps, checkpoint)
        if first_step == 0:
            run.log_evaluation(0, loss)
        for step in range(first_step + 1, steps + 1):
            run.log_step(step, seconds=0.5, tokens=100, epoch=1.0, loss=loss, learning_rate=0.1, grad_norm=1.0)
        run.finish("completed")
    return json.loads((folder / "summary.json").read_text())


def test_a_held_out_loss_of_other_weights_is_not_the_one_after_training(tmp_path):
    summary = run_of(tmp_path, 0, 4)
    assert summary["eval_loss_before"] == 2 and summary["eval_loss_after"] is None


def test_a_run_that_goes_on_from_another_folder_has_that_ones_history(tmp_path):
    run_of(tmp_path / "first", 0, 4, loss=1.0)
    run_of(tmp_path / "other", 0, 6, loss=9.0)
    (tmp_path / "other/tracking.json").write_text('{"wandb": "of-the-other"}')
    for _ in range(2):  # the same command twice
        summary = run_of(tmp_path / "other", 4, 6, tmp_path / "first/checkpoints/step-00000004")
        assert (summary["eval_loss_before"], summary["first_loss"], summary["last_loss"]) == (1, 1, 2)
        assert not (tmp_path / "other/tracking.json").exists()


def test_a_held_out_loss_that_is_not_finite_ends_the_run(tmp_path):
    with refused("the loss of step 0 is nan", "train.learning_rate"):
        run_of(tmp_path, 0, 4, loss=float("nan"))
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


def test_flops_of_a_tied_model_by_hand():
    width, inner, layers, vocabulary, length = 64, 192, 4, 2048, 100
    attention = 2 * width * width + 2 * (width * width // 2)  # q and o; k and v with half the heads
    biases = width + 2 * width // 2  # Qwen2 has them on q, k and v
    layer = attention + biases + 3 * width * inner + 2 * width  # gate, up, down; two norms
    parameters = vocabulary * width + layers * layer + width
    model = load_model(ModelConfig("tiny:qwen2"))
    assert flops_per_token(model, length) == 6 * parameters + 6 * layers * width * length


def test_an_untied_input_embedding_is_not_counted():
    shapes = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    models = [
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", tie_word_embeddings=tied, **shapes))
        for tied in (True, False)
    ]
    tied, untied = (sum(p.numel() for p in model.parameters()) for model in models)
    assert untied == tied + 1000 * 32
    layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    by_hand = 6 * (1000 * 32 + 2 * layer + 32) + 6 * 2 * 32 * 50
    assert [flops_per_token(model, 50) for model in models] == [by_hand, by_hand]


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_grow_with_the_length_in_every_family(family):
    model = load_model(ModelConfig(f"tiny:{family}"))
    assert flops_per_token(model, 300) - flops_per_token(model, 100) == 6 * 4 * 64 * 200


def wait_for(condition, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_host_memory_sees_the_memory_of_a_child_of_a_child():
    grandchild = "import sys, time; block = b'x' * (600 * 2**20); print('ready', flush=True); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        # Only now: between fork and exec, a child seems to have all the memory of its parent.
        host = HostMemory(every_seconds=0.05)
        own = psutil.Process().memory_full_info()  # pages shared with other processes, here or elsewhere, count in part
        assert wait_for(lambda: host.peak_gib > own.pss / 2**30 + 0.4), (own, host.peak_gib)
        assert host.peak_gib < own.rss / 2**30 + 0.65, "shared pages are counted once"
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()
        process.stdout.close()
    peak = host.peak_gib
    time.sleep(0.2)
    assert host.peak_gib == peak, "a peak does not fall"
    host.stop()


def test_host_memory_of_another_process_and_its_end():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host = HostMemory(process.pid, every_seconds=0.02)
    assert wait_for(lambda: host.peak_gib > 0)
    process.communicate(b"\n")
    assert 0 < host.peak_gib < 0.1, "this process, with torch in it, is not below that one"
    host.stop()


def test_json_lines_pass_over_a_torn_line_and_drop_later_steps(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    assert lines.read() == []
    for step in range(1, 6):
        lines.append({"step": step, "loss": 1 / step})
    lines.append({"step": 5, "eval_loss": float("nan"), "grad_norm": float("inf")})
    assert lines.read()[-1] == {"step": 5, "eval_loss": None, "grad_norm": None}
    with lines.path.open("a") as file:
        file.write('{"step": 6, "lo')  # the run was killed here
    assert len(lines.read()) == 6

    lines.keep_up_to(3)
    assert [r["step"] for r in lines.read()] == [1, 2, 3]
    lines.append({"step": 4, "loss": 9.0})
    assert lines.read()[2:] == [{"step": 3, "loss": 1 / 3}, {"step": 4, "loss": 9.0}]
    lines.keep_up_to(-1)
    assert lines.read() == []
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_appended_after_a_torn_one_is_not_lost(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.keep_up_to(5)
    assert lines.read() == [], "a first start has no file"
    lines.append({"step": 1})
    with lines.path.open("a") as file:
        file.write('{"step": 2')
    lines.keep_up_to(2)
    lines.append({"step": 2})
    assert lines.read() == [{"step": 1}, {"step": 2}]


def test_only_numbers_that_json_lacks_become_null():
    record = {"a": 1, "b": 0.5, "c": "nan", "d": float("-inf"), "e": None, "f": True}
    assert finite(record) == {**record, "d": None}
