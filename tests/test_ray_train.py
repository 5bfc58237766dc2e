"""ray-train in real clusters of Ray on this machine: equality with pytorch-ddp, workers that die, resume, two nodes."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import REPOSITORY, refused
from launching import (
    EQUAL,
    PYTHON,
    SMOKE,
    another_job_with_a_gpu,
    assert_close,
    curve,
    environment,
    error_line,
    finished_run,
    kill_at_step,
    losses,
    metrics,
    output_of,
    project_modules,
    ray_nodes,
    run,
    start,
    wait_for_step,
)
from transformers import AutoModelForCausalLM
from wandb_log import history, read_wandb

from bench.shares import RAY
from common import models, ray_address
from common.config import load_config

PROJECT = "ray-train"
# tiny:bloom's gradient norms are about 0.6: some steps clip, some do not.
SAME = [*EQUAL, "model.name=tiny:bloom", "train.weight_decay=0.1", "train.max_grad_norm=0.6"]
TOKEN = "hf_writer"  # which Ray must write nowhere


def fit(*settings: str, **options) -> str:
    return run(PROJECT, *settings, **RAY, **options)


def launcher_run(*settings: str, processes: int = 1) -> None:
    """The loop under torchrun, without a cluster."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [PYTHON, *launcher, f"{PROJECT}/train.py", "--config", "smoke.yaml", *settings],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The variables of a cluster that several tests use: to start one takes as long as a short run."""
    with ray_nodes(tmp_path_factory.mktemp("cluster"), ["--num-cpus=2"]) as variables:
        yield variables


@pytest.fixture(scope="module")
def modules():
    with project_modules(PROJECT, "ds_settings", "cluster", "partitions", "driver", "train") as found:
        yield found


@pytest.fixture(scope="module")
def ddp() -> list[tuple[float, float]]:
    """Losses and gradient norms of pytorch-ddp: the same model, rows and seed."""
    folder = finished_run("pytorch-ddp", *SAME, processes=1)
    norms = [norm for _, norm in losses(folder)]
    assert min(norms) < 0.6 < max(norms)
    return losses(folder)


def test_what_rank_0_prints_comes_out_of_the_drivers_own_streams(modules, tmp_path, capsys, monkeypatch):
    driver = modules["driver"]
    cfg = modules["train"].Config(output_dir=str(tmp_path / "run"))
    console, _ = driver.open_run_folder(cfg)
    assert not console.terminal  # so rank 0 prints lines instead of bars
    with driver.output_to(console):
        print("held-out loss 3 → 2")
        print("warning: tracking.backend=wandb is off", file=sys.stderr)
        assert not sys.stdout.isatty()
    with console.output.open("ab") as file, console.output.open("rb") as lines, console.errors.open("rb") as errors:
        repeats = [driver.Repeat(lines, sys.stdout), driver.Repeat(errors, sys.stderr)]
        for half in ("→".encode()[:1], "→".encode()[1:]):  # a character may be half written when the driver looks
            file.write(half)
            file.flush()
            for repeat in repeats:
                repeat.new()
    shown = capsys.readouterr()
    assert shown.out == "held-out loss 3 → 2\n→" and shown.err == "warning: tracking.backend=wandb is off\n"
    with driver.output_to(None):
        print("as it is")
    assert capsys.readouterr().out == "as it is\n"
    monkeypatch.setenv("PROGRESS", "bar")  # as a notebook sets it
    assert driver.open_run_folder(cfg)[0].terminal


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 16), (2, 2)])
def test_losses_and_gradient_norms_are_those_of_ddp(cluster, ddp, tmp_path, workers, micro_batch):
    """Prompt-masked rows: the ranks have unequal target counts (test_ddp.py). One micro-batch a step, and four."""
    settings = [*SAME, f"train.micro_batch_size={micro_batch}", f"output_dir={tmp_path}"]
    run(PROJECT, *settings, *(["ray.workers=1"] if workers == 1 else []), processes=workers, **cluster)
    assert_close(losses(tmp_path), ddp, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "processes", "relative"),
    [("train.activation_checkpointing=true", 2, 1e-4), ("train.precision=bf16", 1, 2e-2)],
)
def test_options_train_alike_also_without_a_cluster(ddp, tmp_path, setting, processes, relative):
    """And with every weight partitioned: tiny layers are otherwise below what stays whole on all ranks."""
    ds_config = json.loads((REPOSITORY / PROJECT / "ds_config.json").read_text())
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds_config.json").write_text(json.dumps(ds_config))
    settings = ["train.max_steps=8", setting, f"ray.ds_config={tmp_path / 'ds_config.json'}", f"output_dir={tmp_path}"]
    launcher_run(*SAME, *settings, processes=processes)
    ours = [loss for loss, _ in losses(tmp_path)]
    assert ours == pytest.approx([loss for loss, _ in ddp[:8]], rel=relative)
    if relative > 1e-3:
        assert ours != pytest.approx([loss for loss, _ in ddp[:8]], rel=1e-7), "the setting had no effect"


# An epoch is 12 steps here: a run of 20 crosses into the second, in another order.
RESUME = [
    *SMOKE,
    "data.train_rows=200",
    "train.max_steps=20",
    "train.learning_rate=1e-3",
    "train.weight_decay=0.1",
    "checkpoint.every=4",
    "checkpoint.keep=2",
]


@pytest.fixture(scope="module")
def undisturbed(cluster):
    """The run that the killed and stopped ones must equal; it also has a W&B run, offline."""
    folder = finished_run(PROJECT, *RESUME, "tracking.backend=wandb", **cluster)
    output = output_of(folder)
    assert len(losses(folder)) == 20
    # The progress is shown, and each line once.
    assert "Training: 100% (20 of 20 steps)" in output and output.count("held-out loss    ") == 1
    return folder


def checkpoints_of(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_run_leaves_every_ranks_parts_and_a_model_with_the_weights_of_the_masters(undisturbed, modules):
    assert json.loads((undisturbed / "summary.json").read_text())["status"] == "completed"
    (wandb_run,) = undisturbed.parent.rglob("*.wandb")
    logged = history(read_wandb(wandb_run))
    assert [logged[step]["loss"] for step in range(1, 21)] == [loss for loss, _ in losses(undisturbed)]

    assert checkpoints_of(undisturbed) == ["step-00000016", "step-00000020"]
    folder = undisturbed / "checkpoints/step-00000020"
    assert {"parts-0.pt", "parts-1.pt", "rng-0.pt", "rng-1.pt"} <= {path.name for path in folder.iterdir()}
    parts = [torch.load(folder / f"parts-{rank}.pt", weights_only=True)["masters"] for rank in range(2)]
    cfg = load_config(modules["train"].Config, undisturbed / "config.yaml", [])
    trained = models.load_model(cfg.model, cfg.seed)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            assert parts[0][name].numel() == parts[1][name].numel() < parameter.numel()  # no rank has the whole
            flat = torch.cat([part[name] for part in parts])
            parameter.copy_(flat[: parameter.numel()].view(parameter.shape))
        ids = torch.arange(64).reshape(2, 32)
        exported = AutoModelForCausalLM.from_pretrained(undisturbed / "model").eval()
        assert torch.equal(exported(ids).logits, trained.eval()(ids).logits)


def files_with_token(folder: Path) -> tuple[int, list[Path]]:
    """How many files there are below `folder`, and which of them hold the token."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # Ray is at work there
            if TOKEN.encode() in path.read_bytes():
                found.append(path)
    return len(files), found


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The running workers of the cluster that `process`, the driver, has started."""
    found = []
    for member in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(member.cmdline()):
                found.append(member)
    return found


@pytest.mark.slow
def test_ray_replaces_a_worker_that_dies_and_the_losses_stay_the_same(undisturbed, tmp_path):
    began = time.time()
    process = start(PROJECT, *RESUME, f"output_dir={tmp_path}", cold=True, **RAY)
    wait_for_step(process, tmp_path, 14, seconds=280)
    # Start-up counts from the command, of which a worker's process knows nothing.
    assert abs(json.loads((tmp_path / "environment.json").read_text())["started_at"] - began) < 1
    workers = workers_of(process)
    assert len(workers) == 2
    workers[1].kill()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "warning: the worker of rank" in output and "Resuming from the checkpoint of step 12" in output
    assert curve(tmp_path) == curve(undisturbed)
    assert checkpoints_of(tmp_path) == ["step-00000016", "step-00000020"]


@pytest.mark.slow
def test_a_worker_that_dies_in_a_run_that_went_back_does_not_bring_back_the_other_course(undisturbed, tmp_path):
    """It resumes from step 16 with another learning rate, although step 20 is there."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints/step-00000018-mine").mkdir()  # a user's own copy
    settings = [*RESUME, f"checkpoint.resume={tmp_path}/checkpoints/step-00000016", "train.learning_rate=1e-4",
                "train.max_steps=100", "checkpoint.every=50", "checkpoint.keep=3"]  # fmt: skip
    process = start(PROJECT, *settings, f"output_dir={tmp_path}", cold=True, **RAY)
    noted = tmp_path / "checkpoints/checkpoint_manager_snapshot.json"  # what Ray has heard of
    wait_for_step(process, tmp_path, 22, seconds=280)
    while not (noted.exists() and "step-00000016" in noted.read_text()):
        assert process.poll() is None
        time.sleep(0.005)
    workers_of(process)[0].kill()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    first, again = map(int, re.findall(r"Resuming from the checkpoint of step (\d+)", output))
    assert first == 16 and again in (16, 50)  # the latter where the run had got there meanwhile
    left = ("00000016", "00000018-mine", "00000050", "00000100")
    assert checkpoints_of(tmp_path) == [f"step-{name}" for name in left]
    assert [record["step"] for record in metrics(tmp_path) if "loss" in record] == list(range(1, 101))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses_to_the_last_bit(undisturbed, tmp_path):
    settings = [*RESUME, f"output_dir={tmp_path}"]
    process = start(PROJECT, *settings, cold=True, **RAY, HF_TOKEN=TOKEN)
    wait_for_step(process, tmp_path, 1, seconds=280)
    # Ray's own folder, which is gone at the end of a run: its logs, its sockets, what it knows of the job.
    (raylet,) = (p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "raylet")
    argument = next(a for a in raylet.cmdline() if a.startswith("--raylet_socket_name="))
    count, found = files_with_token(Path(argument.partition("=")[2]).parents[1])
    assert count > 10 and not found
    kill_at_step(process, tmp_path, 14)
    output = fit(*settings, cold=True)
    assert "Resuming from the checkpoint of step 12" in output
    assert curve(tmp_path) == curve(undisturbed)
    assert checkpoints_of(tmp_path) == ["step-00000016", "step-00000020"]
    assert max(record["epoch"] for record in metrics(tmp_path) if "epoch" in record) > 1


@pytest.mark.slow
def test_a_stopped_run_saves_leaves_no_process_and_goes_on_with_one_worker(undisturbed, tmp_path):
    settings = [*RESUME, "train.max_steps=2000", "checkpoint.every=0", f"output_dir={tmp_path}"]
    process = start(PROJECT, *settings, cold=True, **RAY)
    wait_for_step(process, tmp_path, 3, seconds=280)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"
    assert checkpoints_of(tmp_path) == [f"step-{steps:08d}"] and not (tmp_path / "model").exists()

    # Another number of ranks, and the newest checkpoint is damaged by then.
    launcher_run(*settings, f"train.max_steps={steps + 4}", "checkpoint.every=2", "checkpoint.keep=3")
    newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1]
    (newest / "parts-0.pt").write_bytes(b"torn")
    launcher_run(*settings, f"train.max_steps={steps + 6}")
    assert [record["step"] for record in metrics(tmp_path) if "loss" in record] == list(range(1, steps + 7))
    together = min(steps, 20)  # the schedules differ, but in the warm-up
    assert_close(losses(tmp_path)[:together], losses(undisturbed)[:together], 1e-4)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_at_once(tmp_path):
    process = start(PROJECT, *SMOKE, "train.max_steps=5000", f"output_dir={tmp_path}", cold=True, **RAY)
    wait_for_step(process, tmp_path, 2, seconds=280)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    while not (tmp_path / ".stop").exists():  # the driver has seen the first
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "stopped" in output and "Traceback" not in output, output
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


@pytest.fixture
def two_nodes(tmp_path_factory):
    """The variables of a cluster of two machines, one CPU each, started from elsewhere."""
    with ray_nodes(tmp_path_factory.mktemp("home"), ["--num-cpus=1"], ["--num-cpus=1"]) as variables:
        yield variables


@pytest.mark.slow
def test_workers_spread_over_two_machines_of_a_cluster_that_is_there(two_nodes, ddp, tmp_path):
    run(PROJECT, *SAME, "train.max_steps=4", f"output_dir={tmp_path}", **two_nodes)
    assert_close(losses(tmp_path), ddp[:4], 1e-4)
    nodes = json.loads((tmp_path / "environment.json").read_text())["nodes"]
    assert len(nodes) == 2 == len(set(nodes)), nodes


@pytest.mark.slow
def test_a_gpu_that_another_job_holds_ends_in_one_line(tmp_path):
    with ray_nodes(tmp_path, ["--num-cpus=2", "--num-gpus=1"]) as cluster, another_job_with_a_gpu(cluster):
        variables = cluster | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
        line = error_line(run(PROJECT, *SMOKE, f"output_dir={tmp_path}/run", exit_code=2, processes=1, **variables))
    assert "within 5 seconds" in line and "another job holds" in line and "ray.workers" in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


# Each with the words that the one line must hold: the key or file, and what to set.
MISTAKES = {
    "misspelt key": (["ray.worker=2"], {}, ["ray.worker", "ray.workers"]),
    "more workers than there is room for": (["ray.workers=999"], {}, ["ray.workers=999", "CPU", "ray start"]),
    "nobody at the address": ([], {"RAY_ADDRESS": "127.0.0.1:1"}, ["RAY_ADDRESS=127.0.0.1:1", "no cluster answers"]),
    "compiled layers": (["train.compile=true"], {}, ["train.compile=true", "gradients", "false"]),
    "missing column": (["data.prompt_column=question"], {}, ["data.prompt_column=question", "prompt, response"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_is_not_tried_again(cluster, tmp_path, mistake):
    settings, variables, words = MISTAKES[mistake]
    place = cluster | variables if mistake != "compiled layers" else RAY  # one in a cluster of its own
    cold = mistake == "missing column"  # a worker finds it
    output = run(PROJECT, *SMOKE, f"output_dir={tmp_path}", *settings, exit_code=2, cold=cold, **place)
    line = error_line(output)
    assert all(word in line for word in words), line
    assert "starts all workers again" not in output and not (tmp_path / "metrics.jsonl").exists()


def test_what_is_wrong_is_found_before_workers_start(modules, tmp_path, monkeypatch):
    place, driver = modules["cluster"].place, modules["driver"]
    assert place(0, {"CPU": 8.0, "GPU": 4.0}) == (4, True) and place(0, {"CPU": 8.0}) == (2, False)
    assert place(3, {"CPU": 1.0, "GPU": 3.0}) == (3, True)
    with refused("ray.workers=5", "4 GPUs", "ray.workers=4"):
        place(5, {"CPU": 64.0, "GPU": 4.0})
    with refused("RAY_ADDRESS=ray://10.0.0.1:10001", "HOST:6379"):
        modules["cluster"]._join("ray://10.0.0.1:10001", {})
    monkeypatch.setattr(ray_address, "ANSWER_SECONDS", 4)
    with socket.create_server(("127.0.0.1", 0)) as other:  # it listens, and is no cluster
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with refused(f"RAY_ADDRESS={address}", "silent for 4 seconds", "ray start --head"):
            modules["cluster"]._join(address, {})
    mismatch = RuntimeError(
        "Version mismatch: The cluster was started with:\n    Ray: 2.1\nThis process:\n    Ray: 2.60"
    )
    assert "Ray: 2.1 This process: Ray: 2.60" in str(ray_address.not_joined("10.0.0.1:6379", mismatch))
    assert "RuntimeError" in str(ray_address.not_joined("10.0.0.1:6379", RuntimeError()))
    cfg = modules["train"].Config(output_dir="/proc/nowhere")
    with refused("output_dir=/proc/nowhere", "cannot be written"):
        driver.open_run_folder(cfg)


def test_a_mistake_is_found_inside_of_what_ray_wraps_around_it(modules):
    import ray.train
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    from common.errors import UserError

    find = modules["driver"].find_user_error
    mistake = UserError("train.max_steps")
    wrapped = UserExceptionWithTraceback(mistake, "text")
    assert find(RuntimeError("x"), wrapped) is mistake
    assert find(ray.train.ControllerError(ray.train.ControllerError(mistake))) is mistake
    assert find(RuntimeError("x")) is None


BAD_DS_CONFIGS = {
    "global batch": ({"zero_optimization": {"stage": 3}, "train_batch_size": 32}, ["train.global_batch_size"]),
    "optimizer": ({"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}, ["train.learning_rate"]),
    "misspelt key": ({"zero_optimization": {"stage": 3, "sub_group": 1}}, ["sub_group", "sub_group_size"]),
    "other stage": ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage is 2", "set it to 3"]),
    "no stage": ({}, ["zero_optimization.stage is not set", "set it to 3"]),
    "offload": ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, ["offload_param"]),
}


@pytest.mark.parametrize("mistake", BAD_DS_CONFIGS)
def test_a_wrong_ds_config_is_refused_with_the_key_and_what_to_set(modules, tmp_path, mistake):
    settings, words = BAD_DS_CONFIGS[mistake]
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    with refused("ds.json", *words):
        modules["ds_settings"].read_ds_config("ds.json", tmp_path)


def test_the_shipped_files_are_accepted_and_completed_from_the_yaml(modules):
    train, ds_settings = modules["train"], modules["ds_settings"]
    cfg = load_config(train.Config, REPOSITORY / PROJECT / "config.yaml", [])
    ds_config = ds_settings.read_ds_config(cfg.ray.ds_config, REPOSITORY / PROJECT)
    settings = ds_settings.engine_settings(ds_config, cfg, torch.bfloat16, 8)
    assert (settings["train_batch_size"], settings["gradient_clipping"]) == (16, 1.0)
    assert settings["bf16"]["enabled"] and settings["data_types"] == {"grad_accum_dtype": "fp32"}
