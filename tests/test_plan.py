"""What a run needs and how long it may take: refused in one line where the machine has too little."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PROJECTS, REPOSITORY, refused
from launching import environment, error_line, project_modules
from transformers import AutoConfig, AutoModelForCausalLM

from bench.real_shapes import SHAPES
from common.config import load_config
from tools import plan

GIB = 2**30
T4 = 14.7 * GIB
KAGGLE = plan.Machine.of("Tesla T4", 2, T4, 30 * GIB)
ONE_T4 = plan.Machine.of("Tesla T4", 1, T4, 30 * GIB)
MEASURED = {  # the record of each project whose settings are nearest to config.yaml's
    "pytorch-ddp": "memory-micro-4", "pytorch-fsdp": "memory-micro-8", "deepspeed-offload": "1024-micro-16",
    "deepspeed-pipeline": "shipped", "llm-foundry-finetune": "speed-t4-settings", "ray-train": "2gpu-micro-4",
    "ray-tune": "asha",
}  # fmt: skip


def shipped(project: str, *settings: str):
    """The project's config.yaml with `settings`, and its model without weights."""
    with project_modules(project, "settings") as found:
        cfg = load_config(found["settings"].Config, REPOSITORY / project / "config.yaml", list(settings))
    shape = dict(SHAPES[cfg.model.name])
    with torch.device("meta"):
        return cfg, AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))


@pytest.mark.parametrize("project", PROJECTS)
def test_the_shipped_run_fits_kaggles_two_t4_and_what_was_measured_is_in_the_plan(project, capsys):
    cfg, model = shipped(project)
    machine = ONE_T4 if project == "deepspeed-offload" else KAGGLE
    plan.check_memory(project, cfg, model, machine)
    gpu, host = (float(n) for n in re.findall(r"([\d.]+) of", capsys.readouterr().out))
    measured = json.loads((REPOSITORY / f"results/{project}/{MEASURED[project]}.json").read_text())["summary"]
    assert gpu <= measured["peak_gpu_gib"] and 0.9 * measured["peak_host_gib"] <= host


@pytest.mark.parametrize("project", PROJECTS)
def test_on_one_gpu_what_is_shared_by_two_is_refused(project):
    cfg, model = shipped(project)
    if project in ("pytorch-ddp", "ray-tune", "deepspeed-offload"):
        plan.check_memory(project, cfg, model, ONE_T4)
    else:
        with refused("GPU memory", "1 × Tesla T4", "14.7", "GPU T4 x2"):
            plan.check_memory(project, cfg, model, ONE_T4)


def test_too_little_host_memory_or_disk_is_refused_with_the_figures(tmp_path):
    cfg, model = shipped("deepspeed-offload", f"output_dir={tmp_path}/run")
    with refused("host memory", "GiB", "16.0"):
        plan.check_memory("deepspeed-offload", cfg, model, plan.Machine.of("Tesla T4", 1, T4, 16 * GIB))
    free = shutil.disk_usage(tmp_path).free / 1e9
    shape = dict(SHAPES[cfg.model.name]) | {"vocab_size": 10**9}
    with torch.device("meta"):
        huge = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))
    with refused(f"{tmp_path}/run", f"{free:.0f}."[:-2], "GB are free"):
        plan.check_disk("deepspeed-offload", cfg, huge, published=None)
    assert not [*tmp_path.iterdir()]


def test_what_lies_there_already_is_not_asked_for_again(tmp_path, capsys):
    cfg, model = shipped("pytorch-ddp", f"output_dir={tmp_path}")
    plan.check_disk("pytorch-ddp", cfg, model, published=None)
    before = float(re.search(r"up to ([\d.]+)", capsys.readouterr().out)[1])
    (tmp_path / "checkpoints").mkdir()
    with (tmp_path / "checkpoints/file").open("ab") as file:
        file.truncate(6 * 10**9)  # takes no space on the disk
    plan.check_disk("pytorch-ddp", cfg, model, published=None)
    assert float(re.search(r"up to ([\d.]+)", capsys.readouterr().out)[1]) == pytest.approx(before - 6, abs=0.11)


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Makes GPUs of one kind the machine's, for the driver's tool and for torch."""

    def have(number: int, name: str, capability: tuple[int, int]) -> None:
        lines = "".join(
            f"echo {i}, GPU-{i}, {name}, 15360 MiB, {capability[0]}.{capability[1]}\n" for i in range(number)
        )
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        for variable in ("NPROC_PER_NODE", "GPU_SHARES", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(variable, raising=False)
        for function, value in (
            ("is_available", True),
            ("get_device_name", name),
            ("get_device_capability", capability),
        ):
            monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])

    return have


def test_the_whole_check_on_two_one_and_no_longer_supported_gpus(gpus, tmp_path, capsys):
    cfg, _ = shipped("pytorch-ddp", f"output_dir={tmp_path}/run", "data.name=pydoc")
    shape = dict(SHAPES[cfg.model.name])
    AutoConfig.for_model(shape.pop("model_type"), **shape).save_pretrained(tmp_path / "model")
    cfg.model.name = str(tmp_path / "model")  # neither the Hub nor weights are needed
    gpus(2, "Tesla T4", (7, 5))
    plan.check("pytorch-ddp", cfg)
    two = capsys.readouterr().out
    assert "7.4 of 15.0 GiB" in two and "an estimate" in two and "one GPU" not in two
    gpus(1, "Tesla T4", (7, 5))
    plan.check("pytorch-ddp", cfg)
    assert "nearly twice the time; on Kaggle choose" in capsys.readouterr().out
    gpus(1, "Tesla P100-PCIE-16GB", (6, 0))
    with refused("Tesla P100", "6.0", "GPU T4 x2"):
        plan.check("pytorch-ddp", cfg)


@pytest.mark.parametrize("project", PROJECTS)
def test_readers_are_told_the_estimate_for_kaggles_two_t4(project):
    cfg, model = shipped(project)
    duration = plan.rough(plan.estimate(project, cfg, model, ONE_T4 if project == "deepspeed-offload" else KAGGLE))
    notebook = (REPOSITORY / project / "notebooks/train.py").read_text().replace("\n# ", " ")
    assert f"takes {duration} on" in notebook and "an estimate, not yet measured" in notebook
    assert f"{duration} on" in (REPOSITORY / project / "README.md").read_text().replace("\n", " ")
    assert f"| `{project}` | {duration.removeprefix('about ')} |" in (REPOSITORY / "docs/kaggle.md").read_text()


def test_the_estimate_follows_the_arithmetic():
    cfg, model = shipped("pytorch-ddp")
    two, one = (plan.estimate("pytorch-ddp", cfg, model, machine) for machine in (KAGGLE, ONE_T4))
    assert 1.3 < one / two < 2
    cfg.train.epochs *= 2
    assert plan.estimate("pytorch-ddp", cfg, model, KAGGLE) == pytest.approx(2 * two, rel=0.05)
    cfg.data.name, cfg.data.train_rows = "somebody/other", 0
    assert plan.estimate("pytorch-ddp", cfg, model, KAGGLE) is None  # how many rows?
    cfg.train.max_steps = 100
    assert plan.estimate("pytorch-ddp", cfg, model, KAGGLE) > 0
    assert plan.estimate("pytorch-ddp", cfg, model, plan.Machine(0, host_bytes=8 * GIB)) is None  # how fast?
    assert [plan.rough(s) for s in (40, 1300, 5300, 18000)] == [
        "about 5 minutes", "about 20 minutes", "about 90 minutes", "about 5 hours",
    ]  # fmt: skip


def run(project: str, *settings: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.plan", project, *settings]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment(cold=True, **variables), capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "token", "says"),
    [
        ([], "hf_reader", ["no GPU found", "GPU T4 x2"]),
        (["runtime.allow_cpu=true"], None, ["Llama-3.2-1B-Instruct is gated", "HF_TOKEN"]),
        (
            ["runtime.allow_cpu=true", "hub.repo_id=writer/new"],
            None,
            ["hub.repo_id=writer/new", "no token", "HF_TOKEN"],
        ),
        (["runtime.allow_cpu=true"], "hf_stranger", ["gated", "ask for it"]),
        (["runtime.allow_cpu=true"], "hf_reader", []),
    ],
)
def test_what_is_missing_is_one_line_before_any_weights_are_there(hub, tmp_path, settings, token, says):
    done = run("deepspeed-pipeline", *settings, **hub.environment(tmp_path / "home", token=token))
    if says:
        assert done.returncode == 2 and all(part in error_line(done.stderr) for part in says), done.stderr
    else:
        assert done.returncode == 0 and "disk" in done.stdout, done.stderr
    assert not [*(tmp_path / "home").rglob("*.safetensors")]


@pytest.mark.slow
def test_without_internet_the_switch_is_named(tmp_path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = run("pytorch-ddp", "runtime.allow_cpu=true", **nowhere)
    line = error_line(done.stderr)
    assert done.returncode == 2 and "no answer from http://127.0.0.1:9" in line and "Settings → Internet" in line
