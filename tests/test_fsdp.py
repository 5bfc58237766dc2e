"""pytorch-fsdp by its real launchers: equality with DDP, kill and resume on other rank counts, export, failures."""

import json
import signal
import subprocess

import pytest
import torch
from conftest import REPOSITORY
from launching import (
    EQUAL,
    PYTHON,
    SMOKE,
    STEPS,
    assert_close,
    curve,
    environment,
    error_line,
    finished_run,
    kill_at_step,
    load_train,
    losses,
    metrics,
    run,
    start,
    wait_for_step,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM
from wandb_log import config, history, read_wandb

from common import models
from common.config import ModelConfig, load_config

PROJECT = "pytorch-fsdp"


def ddp(name: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) by step of pytorch-ddp in one process, which equals a plain loop (test_ddp.py)."""
    return losses(finished_run("pytorch-ddp", *EQUAL, f"model.name={name}", processes=1))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("weights", ["tied", "untied"])
def test_losses_and_gradient_norms_are_those_of_ddp(untied, tmp_path, weights, processes):
    name = "tiny:llama" if weights == "tied" else untied
    run(PROJECT, *EQUAL, f"model.name={name}", f"output_dir={tmp_path}", processes=processes)
    assert len(losses(tmp_path)) == STEPS
    assert_close(losses(tmp_path), ddp(name), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "processes", "relative"),
    [
        (["fsdp.no_sync=true", "fsdp.prefetch=0", "train.micro_batch_size=2"], 2, 1e-5),
        (["fsdp.cpu_offload=true", "fsdp.reshard_after_forward=false", "fsdp.prefetch=3"], 2, 1e-5),
        (["train.activation_checkpointing=true", "train.compile=true"], 1, 1e-4),
        (["train.precision=bf16"], 1, 2e-2),
        (["train.precision=fp16"], 2, 2e-2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_options_train_alike(tmp_path, settings, processes, relative):
    steps = 8
    name = ["model.name=tiny:llama", f"train.max_steps={steps}"]
    run(PROJECT, *EQUAL, *name, *settings, f"output_dir={tmp_path}", processes=processes)
    reference = [loss for loss, _ in ddp("tiny:llama")[:steps]]
    ours = [loss for loss, _ in losses(tmp_path)]
    assert ours == pytest.approx(reference, rel=relative)
    if relative > 1e-3:
        assert ours != pytest.approx(reference, rel=1e-7), "the setting had no effect"


# Started by torchrun: what the two ranks hold, and what a gradient of infinity in one rank's shard does to both.
RANKS = """
import sys
sys.path[:0] = [sys.argv.pop(1)]
import torch, torch.distributed as dist
import train
from common import data, models
from common.config import parse_config

cfg = parse_config(train.Config, train.__file__)
rank, world_size, device = train.setup_distributed(cfg)
model = train.build_model(cfg, device, torch.float16)
whole = sum(p.numel() for p in model.parameters())
mine = sum(p.to_local().numel() for p in model.parameters())
assert all(p.dtype == torch.float32 for p in model.parameters())
optimizer = torch.optim.AdamW(models.parameter_groups(model, 0.0), lr=1e-3, fused=True)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
tokenizer = models.load_tokenizer(cfg.model)
rows, _ = train.build_dataloaders(cfg, tokenizer, rank, world_size)
before = [p.to_local().clone() for p in model.parameters()]
unscale, spoilt = scaler.unscale_, iter([True, False])

def unscale_with_an_infinity(optimizer):
    if next(spoilt) and rank == 1:
        next(model.parameters()).grad.to_local()[0, 0] = float("inf")
    unscale(optimizer)

scaler.unscale_ = unscale_with_an_infinity
for batch in data.step_loader(rows, cfg, tokenizer.pad_token_id, rank, world_size, 0):
    train.train_step(model, batch, optimizer, scaler, cfg, device)
    moved = any(not torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before))
    # one write a line: the ranks share the output
    sys.stdout.write(f"rank={rank} share={mine / whole:.3f} scale={scaler.get_scale()} moved={moved}\\n")
    sys.stdout.flush()
dist.barrier()
"""


@pytest.mark.slow
def test_weights_are_shared_out_and_all_ranks_skip_the_same_fp16_step(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    arguments = [*SMOKE, "train.max_steps=2", "train.precision=fp16", "data.train_rows=100"]
    done = subprocess.run(
        [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
         str(REPOSITORY / PROJECT), "--config", "smoke.yaml", *arguments],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("rank=")]
    assert sorted(lines) == [
        f"rank={rank} share=0.500 scale=512.0 moved={moved}" for rank in (0, 1) for moved in ("False", "True")
    ], done.stdout + done.stderr


# An epoch is 12 steps here: a run of 30 crosses three of them, each in another order. 12 = 2 × 2 × 3 = 3 × 2 × 2 = …
RESUME = [
    *SMOKE,
    "data.train_rows=144",
    "train.global_batch_size=12",
    "train.micro_batch_size=1",
    "train.max_steps=30",
    "train.learning_rate=1e-3",
    "checkpoint.every=5",
    "checkpoint.keep=6",
    "eval.every=15",
]


@pytest.fixture(scope="module")
def undisturbed():
    """The run that the others must equal, with all its checkpoints."""
    folder = finished_run(PROJECT, *RESUME)
    assert len(losses(folder)) == 30
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 23], ids="killed-at-{}".format)
def test_a_killed_run_goes_on_to_the_same_losses_to_the_last_bit(undisturbed, tmp_path, step):
    settings, cold = [*RESUME, f"output_dir={tmp_path}"], step == 23
    process = start(PROJECT, *settings, cold=cold)
    kill_at_step(process, tmp_path, step)
    output = run(PROJECT, *settings, cold=cold)
    assert ("Resuming from the checkpoint" in output) == (step >= 5)
    assert curve(tmp_path) == curve(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3, 4])
def test_shards_of_two_ranks_are_read_by_another_number(undisturbed, tmp_path, processes):
    resume = f"checkpoint.resume={undisturbed}/checkpoints/step-00000020"  # another run folder's, with its history
    output = run(PROJECT, *RESUME, resume, f"output_dir={tmp_path}", processes=processes)
    assert "Resuming from the checkpoint of step 20" in output
    ours, theirs = ([loss for loss, _ in losses(folder)] for folder in (tmp_path, undisturbed))
    assert ours[:20] == theirs[:20] and ours[20:] != theirs[20:]  # rounding, so it was computed again
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_a_stopped_run_saves_its_shards(tmp_path):
    process = start(PROJECT, *RESUME, "checkpoint.every=0", f"output_dir={tmp_path}", cold=True)
    wait_for_step(process, tmp_path, 8)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted" and 8 <= summary["steps"] < 30, output
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert folder.name == f"step-{summary['steps']:08d}"
    assert {file.name[:4] for file in (folder / "shards").glob("*.distcp")} == {"__0_", "__1_"}  # both ranks wrote
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_the_export_is_the_sharded_model(undisturbed, tmp_path):
    """Against the weights in the shards, read without FSDP, and against the losses that the sharded model gave."""
    dcp_to_torch_save(undisturbed / "checkpoints/step-00000030/shards", tmp_path / "whole.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=False)["model"]
    trained = models.load_model(ModelConfig("tiny:opt"))
    trained.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(undisturbed / "model").eval()(ids).logits
        assert torch.equal(exported, trained.eval()(ids).logits)
    done = subprocess.run(
        [PYTHON, f"{PROJECT}/eval.py", "--config", "smoke.yaml", *RESUME, f"output_dir={undisturbed}",
         "eval.samples=0", "eval.generate_rows=0"],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((undisturbed / "eval.json").read_text())
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert figures["base"]["loss"] == pytest.approx(summary["eval_loss_before"], rel=1e-7)
    assert figures["fine_tuned"]["loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-7)


@pytest.mark.slow
def test_wandb_holds_the_metrics_and_the_settings(tmp_path):
    settings = ["data.eval_rows=16", "train.max_steps=4", "train.warmup_steps=0"]
    output = run(PROJECT, *settings, f"output_dir={tmp_path}/offline")
    assert "wandb sync" in output
    (file,) = (tmp_path / "offline").glob("wandb/offline-run-*/*.wandb")  # the main process's alone
    records = read_wandb(file)
    logged = history(records)
    assert [logged[step]["loss"] for step in range(1, 5)] == [loss for loss, _ in losses(tmp_path / "offline")]
    assert config(records)["model.name"] == "tiny:opt" and config(records)["train.max_steps"] == 4

    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "f00dfeed" * 5, "WANDB_INIT_TIMEOUT": "4"}
    output = run(PROJECT, *settings, f"output_dir={tmp_path}/unreachable", processes=1, **nobody)
    assert "warning" in output and "wandb" in output
    assert json.loads((tmp_path / "unreachable/summary.json").read_text())["status"] == "completed"
    assert len(metrics(tmp_path / "unreachable")) == 6


MISTAKES = {
    "misspelt key": (["fsdp.no_synch=true"], ["fsdp.no_synch", "fsdp.no_sync"]),
    "wrong type": (["fsdp.cpu_offload=perhaps"], ["fsdp.cpu_offload", "perhaps"]),
    "negative": (["fsdp.prefetch=-1"], ["fsdp.prefetch=-1"]),
    "another project's key": (["ddp.bucket_mb=25"], ["ddp.bucket_mb"]),
    "global batch": (["train.global_batch_size=18"], ["train.global_batch_size=18", "16 or 20"]),
    "max_length": (["data.max_length=4096"], ["data.max_length=4096", "1024"]),
    "no such folder": (["model.name=./nowhere"], ["model.name", "nowhere"]),
    "missing column": (["data.prompt_column=question"], ["data.prompt_column=question", "prompt, response"]),
    "no checkpoint": (["checkpoint.resume=runs/nowhere"], ["checkpoint.resume=runs/nowhere"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_it(tmp_path, mistake):
    settings, words = MISTAKES[mistake]
    output = run(PROJECT, *SMOKE, f"output_dir={tmp_path}", *settings, processes=1, exit_code=2)
    line = error_line(output)
    assert all(word in line for word in words), line
    assert "Training:" not in output and not (tmp_path / "metrics.jsonl").exists()


def model_folder(folder, **changes) -> str:
    shape = models.load_model_config(ModelConfig("tiny:llama"))
    for name, value in changes.items():
        setattr(shape, name, value)
    shape.save_pretrained(folder)
    models.load_tokenizer(ModelConfig("tiny:llama")).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_two_processes_report_a_model_without_layers_and_one_that_cannot_be_read_once(tmp_path):
    settings = [*SMOKE, "model.random_weights=true", f"output_dir={tmp_path}/run"]
    name = model_folder(tmp_path / "flat", num_hidden_layers=0)
    line = error_line(run(PROJECT, *settings, f"model.name={name}", exit_code=2, cold=True))
    assert "no list of decoder layers" in line and "LlamaForCausalLM" in line
    # Only rank 0 reads the weights: the other rank waits for them, and must not report that.
    name = model_folder(tmp_path / "hollow")
    output = run(PROJECT, *settings, "model.random_weights=false", f"model.name={name}", exit_code=2)
    assert name in error_line(output)


@pytest.mark.slow
def test_a_run_does_not_go_on_from_a_checkpoint_of_another_architecture_or_project(tmp_path):
    folder = tmp_path / "model"
    settings = [*SMOKE, f"model.name={model_folder(folder)}", "model.random_weights=true", "train.max_steps=2"]
    settings += ["train.warmup_steps=0", f"output_dir={tmp_path}/run"]
    run(PROJECT, *settings, processes=1)
    model_folder(folder, intermediate_size=96)
    line = error_line(run(PROJECT, *settings, processes=1, exit_code=2))
    assert "architecture" in line and "64/96" in line and "64/192" in line and "checkpoint.resume=never" in line
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "completed"

    run("pytorch-ddp", *settings, f"output_dir={tmp_path}/ddp", processes=1)
    ddp = f"checkpoint.resume={tmp_path}/ddp/checkpoints/step-00000002"
    line = error_line(run(PROJECT, *settings, f"output_dir={tmp_path}/other", ddp, processes=1, exit_code=2))
    assert "the project is pytorch-fsdp" in line and "written with pytorch-ddp" in line


def test_the_shipped_configuration_fits_its_hardware():
    cfg = load_config(load_train(PROJECT).Config, REPOSITORY / PROJECT / "config.yaml", [])
    record = json.loads((REPOSITORY / "results/pytorch-fsdp/memory-micro-8.json").read_text())
    measured = record["settings"]
    assert cfg.train.micro_batch_size == int(measured["train.micro_batch_size"])
    assert cfg.train.global_batch_size == int(measured["train.global_batch_size"])
    assert cfg.data.max_length == int(measured["data.max_length"])
    assert cfg.train.activation_checkpointing and not cfg.fsdp.no_sync and cfg.fsdp.reshard_after_forward
    assert record["summary"]["peak_gpu_gib"] < 0.85 * float(measured["runtime.gpu_memory_limit_gib"])
    assert record["arithmetic_gib"]["measured / sum"] < 1.15
