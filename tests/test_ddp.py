"""pytorch-ddp by its real launchers: equality with one process and with a plain loop, kill and resume, failures."""

import json
import math
import signal
import time

import psutil
import pytest
import torch
from conftest import REPOSITORY, refused
from launching import (
    EQUAL,
    SMOKE,
    STEPS,
    assert_close,
    curve,
    error_line,
    finished_run,
    kill_at_step,
    load_train,
    losses,
    metrics,
    ranks_of,
    run,
    run_on_two_machines,
    start,
    wait_for_step,
)
from transformers import AutoModelForCausalLM

from bench import plain_loop as reference
from common import data, models
from common.config import load_config

PROJECT = "pytorch-ddp"


@pytest.fixture(scope="module")
def plain_loop() -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    record = reference.train(REPOSITORY / PROJECT / "smoke.yaml", [*EQUAL, "train.micro_batch_size=16"])
    return [*zip(record["losses"], record["grad_norms"], strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 4), (1, 16), (2, 1), (2, 2), (2, 4)])
def test_losses_and_gradient_norms_are_those_of_a_plain_loop(plain_loop, tmp_path, processes, micro_batch):
    run(PROJECT, *EQUAL, f"train.micro_batch_size={micro_batch}", f"output_dir={tmp_path}", processes=processes)
    assert_close(losses(tmp_path), plain_loop, 1e-5)


def test_ranks_of_the_equality_tests_have_unequal_target_counts():
    cfg = load_config(load_train(PROJECT).Config, REPOSITORY / PROJECT / "smoke.yaml", EQUAL)
    tokenizer = models.load_tokenizer(cfg.model)
    rows = data.tokenize(data.load_rows(cfg.data, cfg.seed)[0], cfg.data, tokenizer)
    targets = [[step.targets for step in data.step_loader(rows, cfg, 0, rank, 2)] for rank in range(2)]
    differing = sum(a != b for a, b in zip(*targets, strict=True))
    assert differing > STEPS * 0.8
    assert any(
        batch["labels"].eq(-100).any() for batch in next(iter(data.step_loader(rows, cfg, 0, 0, 2))).micro_batches
    )


@pytest.mark.slow
def test_two_machines_train_as_one(plain_loop, tmp_path):
    run_on_two_machines(PROJECT, *EQUAL, f"output_dir={tmp_path}")
    assert_close(losses(tmp_path), plain_loop, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "processes", "relative"),
    [
        (["train.activation_checkpointing=true"], 1, 1e-5),
        (["train.compile=true"], 1, 1e-4),
        (["train.precision=bf16"], 1, 2e-2),
        (["train.precision=fp16"], 1, 2e-2),
        (["ddp.gradient_compression=fp16"], 2, 2e-2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_options_train_alike(plain_loop, tmp_path, settings, processes, relative):
    steps = 8
    run(PROJECT, *EQUAL, f"train.max_steps={steps}", *settings, f"output_dir={tmp_path}", processes=processes)
    ours = [loss for loss, _ in losses(tmp_path)]
    assert ours == pytest.approx([loss for loss, _ in plain_loop[:steps]], rel=relative)
    if relative > 1e-3:
        assert ours != pytest.approx([loss for loss, _ in plain_loop[:steps]], rel=1e-7), "the setting had no effect"


# An epoch is 12 steps here: a run of 40 crosses three of them, each in another order.
RESUME = [
    *SMOKE,
    "data.train_rows=200",
    "train.max_steps=40",
    "train.learning_rate=1e-3",  # as in EQUAL
    "checkpoint.every=5",
    "checkpoint.keep=2",
    "eval.every=20",
]


@pytest.fixture(scope="module")
def undisturbed():
    """The run that the killed ones must equal."""
    folder = finished_run(PROJECT, *RESUME)
    assert len(losses(folder)) == 40
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 18, 32], ids="killed-at-{}".format)
def test_a_killed_run_goes_on_to_the_same_losses_to_the_last_bit(undisturbed, tmp_path, step):
    settings, cold = [*RESUME, f"output_dir={tmp_path}"], step == 18
    process = start(PROJECT, *settings, cold=cold)
    kill_at_step(process, tmp_path, step)
    output = run(PROJECT, *settings, cold=cold)
    assert ("Resuming from the checkpoint" in output) == (step >= 5)
    assert curve(tmp_path) == curve(undisturbed)
    epochs = [record["epoch"] for record in metrics(tmp_path) if "epoch" in record]
    assert max(epochs) > 3  # the second epoch's order was part of it


@pytest.mark.slow
def test_a_stopped_run_saves_and_goes_on_with_another_number_of_processes(undisturbed, tmp_path):
    settings = [*RESUME, "checkpoint.every=0", f"output_dir={tmp_path}"]
    began = time.time()
    process = start(PROJECT, *settings, cold=True)
    wait_for_step(process, tmp_path, 12)
    stepping = time.time()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted" and 12 <= summary["steps"] < 40, output
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{summary['steps']:08d}"]
    assert not (tmp_path / "model").exists()
    # Start-up counts from the command, launch.sh, on.
    assert abs(json.loads((tmp_path / "environment.json").read_text())["started_at"] - began) < 1
    startup = summary["startup"]
    assert startup["imports"] > 1 and startup["total"] < stepping - began + 1

    run(PROJECT, *settings, processes=1)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "completed"
    assert_close(losses(tmp_path), losses(undisturbed), 1e-5)
    assert len(curve(tmp_path)) == len(curve(undisturbed))


@pytest.mark.slow
def test_a_run_stops_in_time_and_a_finished_one_says_so(tmp_path):
    settings = [*SMOKE, "train.max_steps=5", "train.warmup_steps=0", "eval.every=1", f"output_dir={tmp_path}/first"]
    output = run(PROJECT, *settings, "runtime.max_hours=0.0001", processes=1, PYTHONIOENCODING="ascii")
    assert "training loss" in output and " -> " in output  # what ASCII does not have does not end a run
    assert "1 rank × 4 per micro-batch × 4 accumulation steps".replace("×", "x") in output
    assert "runtime.max_hours=0.0001 is over" in output
    first = tmp_path / "first"
    assert [record["step"] for record in metrics(first) if "eval_loss" in record] == [0, 1]  # none that is due is lost
    assert json.loads((first / "summary.json").read_text())["status"] == "interrupted"
    run(PROJECT, *settings, processes=1)
    before = curve(first)
    output = run(PROJECT, *settings, processes=1)
    assert "This run is complete: step 5 of 5" in output and curve(first) == before

    # More steps, in a folder of their own, in another precision: on the longer schedule at once, with all the history.
    longer = [
        *settings,
        "train.max_steps=7",
        "train.precision=fp16",
        f"checkpoint.resume={first}/checkpoints/step-00000005",
    ]
    run(PROJECT, *longer, f"output_dir={tmp_path}/second", processes=1)
    steps = [record for record in metrics(tmp_path / "second") if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 8))
    peak = steps[0]["learning_rate"]
    assert steps[5]["learning_rate"] == pytest.approx(peak * (1 + math.cos(math.pi * 5 / 7)) / 2)
    summary = json.loads((tmp_path / "second/summary.json").read_text())
    assert summary["eval_loss_before"] == json.loads((first / "summary.json").read_text())["eval_loss_before"]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(tmp_path):
    process = start(PROJECT, *SMOKE, "train.max_steps=5000", f"output_dir={tmp_path}")
    wait_for_step(process, tmp_path, 3)
    workers = ranks_of(process)
    workers[1].kill()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert not [
        worker for worker in workers.values() if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
    ]


@pytest.mark.slow
def test_the_export_is_the_trained_model(tmp_path):
    run(PROJECT, *SMOKE, "train.max_steps=5", f"output_dir={tmp_path}")
    state = torch.load(tmp_path / "checkpoints/step-00000005/training.pt", weights_only=True)["model"]
    trained = models.load_model(load_config(load_train(PROJECT).Config, tmp_path / "config.yaml", []).model)
    trained.load_state_dict(
        {
            name.removeprefix(
                "model.",
            ): tensor
            for name, tensor in state.items()
        }
    )
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(ids).logits
        assert torch.equal(exported, trained.eval()(ids).logits)
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "model",
        "plots",
    }
    assert (tmp_path / "model/README.md").read_text().startswith("---\n")


# Each with the words that the one line must hold: the key or file, and what to set.
MISTAKES = {
    "misspelt key": (["train.max_step=3"], ["train.max_step", "train.max_steps"]),
    "wrong type": (["train.max_steps=soon"], ["train.max_steps", "soon"]),
    "global batch": (["train.global_batch_size=18"], ["train.global_batch_size=18", "16 or 20"]),
    "max_length": (["data.max_length=4096"], ["data.max_length=4096", "1024"]),
    "unknown model": (["model.name=tiny:gpt5"], ["model.name=tiny:gpt5", "tiny:qwen2"]),
    "no such folder": (["model.name=./nowhere"], ["model.name", "nowhere"]),
    "missing column": (["data.prompt_column=question"], ["data.prompt_column=question", "prompt, response"]),
    "output folder": (["output_dir=/proc/nowhere"], ["output_dir=/proc/nowhere"]),
    "compression": (["ddp.gradient_compression=bf16"], ["ddp.gradient_compression=bf16", "fp16 or none"]),
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


@pytest.mark.slow
def test_two_processes_report_a_mistake_once(tmp_path):
    output = run(PROJECT, *SMOKE, f"output_dir={tmp_path}", "data.prompt_column=question", exit_code=2, cold=True)
    assert "data.prompt_column=question" in error_line(output)
    assert output.count("question") == 1
    # Only rank 0 looks at the output folder: the other rank meets it as a lost connection, and must not report that.
    output = run(PROJECT, *SMOKE, "output_dir=/proc/nowhere", exit_code=2)
    assert "output_dir=/proc/nowhere" in error_line(output)


@pytest.mark.slow
def test_rows_that_are_no_text_and_an_empty_file(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": i}) + "\n" for i in range(100)))
    settings = [*SMOKE, "data.format=text", f"data.name={rows}", f"output_dir={tmp_path / 'run'}"]
    line = error_line(run(PROJECT, *settings, processes=1, exit_code=2))
    assert "rows.jsonl" in line and "row 1: column text holds a number" in line
    rows.write_text("")
    assert "is empty" in error_line(run(PROJECT, *settings, processes=1, exit_code=2))


@pytest.mark.slow
def test_a_run_does_not_go_on_from_another_runs_checkpoint(tmp_path):
    settings = [*SMOKE, "train.max_steps=3", f"output_dir={tmp_path}"]
    run(PROJECT, *settings, processes=1)
    for other, key in (("model.name=tiny:llama", "model.name"), ("data.train_rows=900", "training data")):
        line = error_line(run(PROJECT, *settings, other, processes=1, exit_code=2))
        assert key in line and "checkpoint.resume=never" in line
    file = tmp_path / "checkpoints/step-00000003/training.pt"
    file.write_bytes(file.read_bytes()[:-1000])
    output = run(PROJECT, *settings, processes=1, exit_code=2)
    assert "step-00000003 is damaged" in output and "training.pt has" in output
    assert "every checkpoint in it is damaged" in error_line(output)
    # None of these refused starts has touched what the finished run left.
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "completed"
    assert "tiny:qwen2" in (tmp_path / "config.yaml").read_text() and len(losses(tmp_path)) == 3
    line = error_line(
        run(PROJECT, *settings, f"checkpoint.resume={tmp_path}/checkpoints/step-00000009", processes=1, exit_code=2)
    )
    assert "step-00000009" in line


def test_more_processes_than_gpus_are_refused(monkeypatch):
    train = load_train(PROJECT)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with refused("2 processes for 1 GPU", "--nproc_per_node 1"):
        train.setup_distributed(train.Config())
