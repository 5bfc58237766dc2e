"""deepspeed-offload by its real launchers: equality with pytorch-ddp, kill and resume, preflight, failures."""

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cpuinfo
import pytest
import torch
from conftest import REPOSITORY, refused
from launching import (
    EQUAL,
    PYTHON,
    SMOKE,
    assert_close,
    curve,
    environment,
    error_line,
    finished_run,
    kill_at_step,
    losses,
    metrics,
    project_modules,
    ranks_of,
    run,
    start,
    wait_for_step,
)
from transformers import AutoModelForCausalLM
from wandb_log import history, read_wandb

from common import models
from common.config import ModelConfig, load_config
from launchers import deepspeed_launcher

PROJECT = "deepspeed-offload"
# Groups of 50,000 parameters: the tiny model then has several, as the real one does.
GROUPS = "offload.group_millions=0.05"
# What both projects are given. About half of the steps clip; whose docstrings they learn depends on the Python.
SAME = [*EQUAL, "model.name=tiny:llama", "train.weight_decay=0.1", "train.max_grad_norm=0.65"]


@pytest.fixture(scope="module")
def modules():
    with project_modules(PROJECT, "host_buffers", "memory_plan", "ds_settings", "cpu_adam_op", "train") as found:
        yield found


@pytest.fixture(scope="module")
def ddp() -> list[tuple[float, float]]:
    """Losses and gradient norms of pytorch-ddp: the same model, rows and seed, clipping on."""
    folder = finished_run("pytorch-ddp", *SAME, processes=1)
    norms = [norm for _, norm in losses(folder)]
    assert min(norms) < 0.65 < max(norms)  # some steps clip, some do not
    return losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 16), (2, 2)])
def test_losses_and_gradient_norms_are_those_of_ddp(ddp, tmp_path, processes, micro_batch):
    """Prompt-masked rows: the ranks have unequal target counts (test_ddp.py). One micro-batch per step, and four."""
    settings = [*SAME, GROUPS, f"train.micro_batch_size={micro_batch}", f"output_dir={tmp_path}"]
    output = run(PROJECT, *settings, processes=processes)
    assert "lr_scheduler" not in output  # torch warns if it sees no optimizer.step
    assert_close(losses(tmp_path), ddp, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "relative"),
    [
        (["offload.optimizer=torch", "train.activation_checkpointing=true", "train.compile=true"], 1e-4),
        (["train.precision=bf16"], 2e-2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_options_train_alike(ddp, tmp_path, settings, relative):
    steps = 8
    run(PROJECT, *SAME, GROUPS, f"train.max_steps={steps}", *settings, f"output_dir={tmp_path}", processes=1)
    assert_close(losses(tmp_path), ddp[:steps], relative)
    assert losses(tmp_path) != ddp[:steps], "the setting had no effect"


@pytest.mark.slow
def test_shared_buffers_train_as_deepspeeds_own_do(tmp_path):
    """bf16, so that the fp32 gradients of DeepSpeed's own hold more bits; four micro-batches, on two processes."""
    settings = [*SAME, GROUPS, "train.max_steps=8", "train.precision=bf16", "train.micro_batch_size=2"]
    for ds_config in ("ds_config.json", "bench/ds_default.json"):
        run(PROJECT, *settings, f"offload.ds_config={ds_config}", f"output_dir={tmp_path / Path(ds_config).stem}")
    assert losses(tmp_path / "ds_config") == losses(tmp_path / "ds_default")


@pytest.mark.slow
def test_torchrun_and_the_deepspeed_command_start_it_too(ddp, tmp_path):
    script = [f"{PROJECT}/train.py", "--config", "smoke.yaml", *SAME, GROUPS, "train.max_steps=3"]
    starts = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
        "deepspeed": ["deepspeed.launcher.runner", "--num_accelerators=2"],
    }
    running = {
        name: subprocess.Popen(
            [PYTHON, "-m", *launcher, *script, f"output_dir={tmp_path / name}"],
            cwd=REPOSITORY,
            env=environment(DS_ACCELERATOR="cpu"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, launcher in starts.items()
    }
    for name, process in running.items():
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        assert_close(losses(tmp_path / name), ddp[:3], 1e-4)


# An epoch is 12 steps here: a run of 20 crosses into the second, in another order.
RESUME = [
    *SMOKE,
    GROUPS,
    "data.train_rows=200",
    "train.max_steps=20",
    "train.learning_rate=1e-3",
    "checkpoint.every=4",
    "checkpoint.keep=2",
]


@pytest.fixture(scope="module")
def undisturbed():
    """The run that the killed and stopped ones must equal; it also has a W&B run, offline."""
    folder = finished_run(PROJECT, *RESUME, "tracking.backend=wandb")
    assert len(losses(folder)) == 20
    return folder


@pytest.mark.slow
def test_a_run_leaves_its_records_and_a_model_with_the_weights_of_the_masters(undisturbed, modules):
    assert json.loads((undisturbed / "summary.json").read_text())["status"] == "completed"
    (wandb_run,) = undisturbed.parent.rglob("*.wandb")
    logged = history(read_wandb(wandb_run))
    assert [logged[step]["loss"] for step in range(1, 21)] == [loss for loss, _ in losses(undisturbed)]
    plan = json.loads((undisturbed / "environment.json").read_text())["memory_plan"]["host"]
    assert 0 < plan["predicted_gib"] < plan["available_gib"]
    saved = torch.load(undisturbed / "checkpoints/step-00000020/training.pt", weights_only=True)
    assert saved == {"ranks": 2, "steps": 20, "scaler": {}}  # in fp32 there is none

    # The export against the masters that the two ranks wrote, laid together by the groups' order.
    cfg = load_config(modules["train"].Config, undisturbed / "config.yaml", [])
    model = models.load_model(cfg.model, cfg.seed)
    groups = models.parameter_groups(model, cfg.train.weight_decay)
    pieces = models.small_groups(groups, cfg.offload.group_millions * 1e6)
    assert len(pieces) > 3
    for i, piece in enumerate(pieces):
        parts = [undisturbed / f"checkpoints/step-00000020/masters-{i}-{rank}.pt" for rank in range(2)]
        flat = torch.cat([torch.load(part, weights_only=True) for part in parts])
        for parameter in piece["params"]:
            values, flat = flat[: parameter.numel()], flat[parameter.numel() :]
            parameter.data.copy_(values.view(parameter.shape))
    ids = torch.arange(64).reshape(2, 32)
    exported = AutoModelForCausalLM.from_pretrained(undisturbed / "model").eval()
    assert {p.dtype for p in exported.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, model.eval()(ids).logits)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses_to_the_last_bit(undisturbed, tmp_path):
    settings = [*RESUME, f"output_dir={tmp_path}"]
    process = start(PROJECT, *settings, cold=True)
    kill_at_step(process, tmp_path, 14)
    output = run(PROJECT, *settings, cold=True)
    assert "Resuming from the checkpoint of step 12" in output
    assert curve(tmp_path) == curve(undisturbed)
    assert max(record["epoch"] for record in metrics(tmp_path) if "epoch" in record) > 1


@pytest.mark.slow
def test_a_stopped_run_saves_and_goes_on_with_another_number_of_processes(undisturbed, tmp_path):
    settings = [*RESUME, "checkpoint.every=0", f"output_dir={tmp_path}"]
    process = start(PROJECT, *settings, cold=True)
    wait_for_step(process, tmp_path, 7)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted" and 7 <= summary["steps"] < 20, output
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{summary['steps']:08d}"]
    assert not (tmp_path / "model").exists()

    # In another folder, as the next session of a machine that keeps nothing has it: with all the history.
    settings += [f"checkpoint.resume={tmp_path}/checkpoints/step-{summary['steps']:08d}", f"output_dir={tmp_path}/on"]
    run(PROJECT, *settings, processes=1)
    assert json.loads((tmp_path / "on/summary.json").read_text())["status"] == "completed"
    assert_close(losses(tmp_path / "on"), losses(undisturbed), 1e-4)
    line = error_line(run(PROJECT, *settings, "offload.group_millions=0.1", processes=1, exit_code=2))
    assert "offload.group_millions is 0.1" in line and "written with 0.05" in line


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(tmp_path):
    process = start(PROJECT, *SMOKE, "train.max_steps=5000", f"output_dir={tmp_path}")
    wait_for_step(process, tmp_path, 2)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    output = process.communicate(timeout=90)[0]
    assert process.returncode, output


# Each with the words that the one line must hold: the key or file, and what to set.
MISTAKES = {
    "misspelt key": (["offload.optimiser=torch"], ["offload.optimiser", "offload.optimizer"]),
    "optimizer": (["offload.optimizer=cpuadam"], ["offload.optimizer=cpuadam", "cpu_adam"]),
    "global batch": (["train.global_batch_size=18"], ["train.global_batch_size=18", "16 or 20"]),
    "max_length": (["data.max_length=4096"], ["data.max_length=4096", "1024"]),
    "missing column": (["data.prompt_column=question"], ["data.prompt_column=question", "prompt, response"]),
    "no DeepSpeed settings": (["offload.ds_config=nowhere.json"], ["offload.ds_config=nowhere.json"]),
    "no checkpoint": (["checkpoint.resume=runs/nowhere"], ["checkpoint.resume=runs/nowhere"]),
    "precision": (["train.precision=fp16"], ["train.precision=fp16", "fp32 or bf16"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["no DeepSpeed settings", "missing column"])
def test_two_processes_report_a_mistake_once(tmp_path, mistake):
    settings, words = MISTAKES[mistake]
    cold = mistake == "missing column"
    output = run(PROJECT, *SMOKE, f"output_dir={tmp_path}", *settings, exit_code=2, cold=cold)
    line = error_line(output)
    assert all(word in line for word in words), line
    assert "Training:" not in output and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_mistake_ends_in_one_line_that_names_it(tmp_path):
    """All at once: each start takes its time to import DeepSpeed."""
    running = {
        mistake: start(PROJECT, *SMOKE, f"output_dir={tmp_path / mistake.replace(' ', '-')}", *settings, processes=1)
        for mistake, (settings, _) in MISTAKES.items()
        if not (mistake == "precision" and _cpu_has_fp16())
    }
    for mistake, process in running.items():
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 2, output
        line = error_line(output)
        assert all(word in line for word in MISTAKES[mistake][1]), line
        assert "Training:" not in output and not (tmp_path / mistake.replace(" ", "-") / "metrics.jsonl").exists()


def _cpu_has_fp16() -> bool:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().is_fp16_supported()


@pytest.mark.slow
def test_a_machine_without_compiler_or_ninja_is_told_what_to_do(tmp_path):
    """A PATH without compilers: what cannot be compiled is named, and torch's AdamW needs none of them."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("nproc", "uname", "git"):
        if found := next((p for p in ("/usr/bin", "/bin") if os.path.exists(f"{p}/{name}")), None):
            (tools / name).symlink_to(f"{found}/{name}")
    variables = {"PATH": str(tools), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    command = [sys.executable, f"{PROJECT}/train.py", "--config", "smoke.yaml", *SMOKE, "train.max_steps=2"]

    def outcome(*settings: str) -> tuple[int, str]:
        done = subprocess.run(
            [*command, f"output_dir={tmp_path / 'run'}", *settings],
            cwd=REPOSITORY,
            env=environment() | variables,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    code, output = outcome()
    line = error_line(output)
    assert code == 2 and "C++ compiler" in line and "c++" in line and "offload.optimizer=torch" in line
    code, output = outcome("offload.optimizer=torch")
    assert code == 0, output
    assert len(losses(tmp_path / "run")) == 2


DS = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}}
BAD_DS_CONFIGS = {
    "global batch": ({**DS, "train_batch_size": 32}, ["train_batch_size", "train.global_batch_size"]),
    "micro batch": ({**DS, "train_micro_batch_size_per_gpu": 4}, ["train.micro_batch_size"]),
    "accumulation": ({**DS, "gradient_accumulation_steps": 4}, ["gradient_accumulation_steps", "global_batch_size"]),
    "clipping": ({**DS, "gradient_clipping": 1.0}, ["gradient_clipping", "train.max_grad_norm"]),
    "fp16": ({**DS, "fp16": {"enabled": True}}, ["fp16.enabled", "train.precision"]),
    "bf16": ({**DS, "bf16": {"enabled": True}}, ["bf16", "train.precision"]),
    "optimizer": ({**DS, "optimizer": {"type": "AdamW"}}, ["optimizer", "train.learning_rate", "offload.optimizer"]),
    "scheduler": ({**DS, "scheduler": {"type": "WarmupLR"}}, ["scheduler", "train.lr_schedule"]),
    "printing": ({**DS, "steps_per_print": 10}, ["steps_per_print", "metrics.jsonl"]),
    "misspelt section": ({"zero_optimisation": {}}, ["zero_optimisation", "zero_optimization"]),
    "misspelt key": ({"zero_optimization": {"stage": 2, "overlap_com": True}}, ["overlap_com", "overlap_comm"]),
    "misspelt key of the YAML's": ({**DS, "gradient_cliping": 1}, ["gradient_cliping", "gradient_clipping"]),
    "wrong type": ({"zero_optimization": {"stage": "two"}}, ["zero_optimization.stage", '"two"', "whole number"]),
    "true is not a number": (
        {"zero_optimization": {"reduce_bucket_size": True}},
        ["reduce_bucket_size", "whole number"],
    ),
    "no object": ({"zero_optimization": 2}, ["zero_optimization is 2", "object"]),
    "other stage": ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage is 3", "set it to 2"]),
    "no stage": ({}, ["zero_optimization.stage is not set", "set it to 2"]),
    "no offload": ({"zero_optimization": {"stage": 2}}, ["offload_optimizer.device is not set", "cpu"]),
    "offload to a disk": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
        ["offload_optimizer.device is nvme", "cpu"],
    ),
    "a list": ([1], ["one object"]),
}


@pytest.mark.parametrize("mistake", BAD_DS_CONFIGS)
def test_a_wrong_ds_config_is_refused_with_the_key_and_what_to_set(modules, tmp_path, mistake):
    settings, words = BAD_DS_CONFIGS[mistake]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    with refused("ds.json", *words):
        modules["ds_settings"].read_ds_config(str(path), tmp_path)


def test_deepspeed_is_told_once_what_cpu_this_is(modules, monkeypatch):
    op, answers = modules["cpu_adam_op"], []
    known = {"arch": "X86_64", "flags": ["avx2"]}
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: answers.append(known) or known)
    op.ask_for_the_cpu_once()
    builder = op.CPUAdamBuilder()
    assert (builder.cpu_arch(), builder.simd_width()) == ("-march=native", "-D__AVX256__")
    assert len(answers) == 1


def test_invalid_json_is_refused_with_line_and_column(modules, tmp_path):
    (tmp_path / "ds.json").write_text('{\n  "zero_optimization": {\n    "stage": 2,\n  }\n}\n')
    with refused("ds.json:", "not valid JSON"):
        modules["ds_settings"].read_ds_config("ds.json", tmp_path)
    (tmp_path / "ds.json").write_text('{\n  "zero_optimization" 2\n}\n')
    with refused("ds.json:2:23: not valid JSON"):
        modules["ds_settings"].read_ds_config("ds.json", tmp_path)


def test_the_shipped_files_are_accepted_and_completed_from_the_yaml(modules):
    train, ds_settings = modules["train"], modules["ds_settings"]
    cfg = load_config(train.Config, REPOSITORY / PROJECT / "config.yaml", [])
    for file in ("ds_config.json", str(REPOSITORY / "bench/ds_default.json")):
        ds_config = ds_settings.read_ds_config(file, REPOSITORY / PROJECT)
        settings = ds_settings.engine_settings(ds_config, cfg, torch.bfloat16, 1)
        assert (settings["train_batch_size"], settings["gradient_clipping"]) == (16, 1.0)
        assert (settings["fp16"]["enabled"], settings["bf16"]["enabled"]) == (False, True)
        assert settings["zero_optimization"] == ds_config["zero_optimization"]


# The preflight, with the shapes of Llama-3.2-1B in its formulas.
@pytest.fixture
def llama(modules):
    layer = 60817408
    return modules["memory_plan"].Model(
        groups=[[262668288], *[[layer // 2, layer // 2]] * 16, [67584]],
        largest=262668288,
        head=262668288,
        vocabulary=128256,
        width=2048,
        inner=8192,
        layers=16,
    )


def ds(accumulation: int = 1, pin_memory: bool = False) -> dict:
    offload = {"device": "cpu", "pin_memory": pin_memory}
    zero = {"stage": 2, "offload_optimizer": offload, "reduce_bucket_size": 10**8, "overlap_comm": True}
    return {"zero_optimization": zero, "gradient_accumulation_steps": accumulation}


def test_the_host_prediction_adds_up_what_deepspeed_allocates(modules, llama):
    plan, gib = modules["memory_plan"], 2**30
    one = plan.host_bytes(llama, ds(), 2, 1, 1, "cuda")
    assert one["masters"] == 4 * llama.parameters and one["moments"] == 8 * llama.parameters
    assert one["gradients and new weights"] == 2 * llama.parameters
    assert sum(one.values()) / gib == pytest.approx(16.1 + plan.PROCESS["cuda"] / gib, abs=0.1)
    # Accumulation takes nothing: the sum so far lies where the gradients will.
    assert plan.host_bytes(llama, ds(accumulation=4), 2, 1, 1, "cuda") == one
    # Two ranks share the model's state; each is a process of its own.
    two = plan.host_bytes(llama, ds(), 2, 2, 2, "cuda")
    assert sum(two.values()) - sum(one.values()) == pytest.approx(plan.PROCESS["cuda"], rel=1e-3)
    # Here the embedding and the last group lie on both, and have buffers of their own on each.
    accumulating = plan.host_bytes(llama, ds(accumulation=4), 2, 2, 2, "cuda")
    assert sum(accumulating.values()) - sum(two.values()) == 2 * 2 * (llama.head + 67584)
    # DeepSpeed's own page-locking: a layer's 232 MiB become 256, fp32 gradients are there as well.
    pinned = plan.host_bytes(llama, ds(pin_memory=True), 2, 1, 1, "cuda")
    assert pinned["masters"] == pinned["gradients"] == gib + 16 * 2**28 + 2**19
    assert pinned["new weights"] > one["gradients and new weights"] + gib / 2


def test_the_gpu_prediction_grows_with_what_it_should(modules, llama):
    plan = modules["memory_plan"]

    def total(tokens=16384, b=2, checkpointing=True, **settings):
        return sum(plan.gpu_bytes(llama, ds(**settings), b, tokens, checkpointing).values()) / 2**30

    assert total() > total(tokens=4096) and total(b=4) > 1.8 * total()
    assert total(checkpointing=False) > 2 * total()
    assert total() < 14.7 < total(tokens=65536)


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "max", "memory.current": "5"}, None),
        ({"memory.max": "1000", "memory.current": "400", "memory.stat": "anon 300\ninactive_file 100"}, 700),
        ({"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5"}, None),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "400",
                "memory/memory.stat": "total_inactive_file 50",
            },
            650,
        ),
    ],
    ids=["v2 without limit", "v2", "v1 without limit", "v1"],
)
def test_a_containers_limit_counts(modules, tmp_path, files, left):
    plan = modules["memory_plan"]
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    whole = plan.psutil.virtual_memory().available
    found = plan.host_memory(tmp_path)
    assert found == left if left else abs(found - whole) < 2**30
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("12:cpu,memory:/slice\n0::/slice\n")
    assert plan.host_memory(tmp_path) == found if left else True


def test_too_little_memory_is_an_error_and_little_a_warning(modules, capsys):
    compare, gib = modules["memory_plan"]._compare, 2**30
    parts = {"weights": 2.3 * gib, "step": 5.2 * gib}
    with refused("GPU memory", "needs about 7.5 GiB", "weights 2.3", "6.0 GiB are there", "1.5 GiB too little", "less"):
        compare("GPU", parts, 6 * gib, ["less"])
    assert compare("GPU", parts, 16 * gib, ["less"])["predicted_gib"] == 7.5
    assert capsys.readouterr().err == ""
    compare("GPU", parts, 8 * gib, ["less"])
    assert "warning: GPU memory will be tight: about 7.5 of 8.0 GiB" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path):
    shapes = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
              "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8}  # fmt: skip
    folder = tmp_path / "llama-405b"
    models.load_tokenizer(ModelConfig(name="tiny:llama")).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(shapes))
    settings = [*SMOKE, f"model.name={folder}", "model.random_weights=true", f"output_dir={tmp_path / 'run'}"]
    line = error_line(run(PROJECT, *settings, processes=1, exit_code=2))
    assert "host memory: this run needs about" in line and "too little" in line and "a smaller model" in line


def test_the_launcher_is_told_about_machines_and_devices(monkeypatch):
    def world(options):
        return json.loads(base64.urlsafe_b64decode(options[0].split("=", 1)[1]))

    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "GPU_SHARES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    assert world(deepspeed_launcher.launcher_options(2)) == {"machine-0": ["0", "1"]}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert world(deepspeed_launcher.launcher_options(2)) == {"machine-0": ["2", "5"]}
    with refused("4 processes", "CUDA_VISIBLE_DEVICES=2,5,7", "room for 3", "NPROC_PER_NODE"):
        deepspeed_launcher.launcher_options(4)  # not three of them
    monkeypatch.setenv("GPU_SHARES", "2")
    assert world(deepspeed_launcher.launcher_options(4)) == {"machine-0": ["2", "2", "5", "5"]}
    with refused("7 processes", "CUDA_VISIBLE_DEVICES=2,5,7", "room for 6", "NPROC_PER_NODE"):
        deepspeed_launcher.launcher_options(7)
    monkeypatch.delenv("GPU_SHARES")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for visible in ("-1", "0", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert world(deepspeed_launcher.launcher_options(2)) == {"machine-0": ["-1", "-1"]}
    monkeypatch.delenv("DS_ACCELERATOR")  # with CUDA_VISIBLE_DEVICES empty, as if it were not set
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("NODE_RANK", "1")
    with refused("NNODES=2", "MASTER_ADDR"):
        deepspeed_launcher.launcher_options(2)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    options = deepspeed_launcher.launcher_options(2)
    assert world(options) == {"machine-0": ["0", "1"], "machine-1": ["0", "1"]}
    assert {"--node_rank=1", "--master_addr=10.0.0.1"} <= set(options)
    for name, wrong, words in (("NODE_RANK", "2", "the last 1"), ("NNODES", "two", "2"), ("NNODES", "0", "2")):
        monkeypatch.setenv(name, wrong)
        with refused(f"{name}={wrong}", words):
            deepspeed_launcher.launcher_options(2)
