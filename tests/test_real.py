"""bench/real.py on two CPU processes, and the tables that its records become."""

import json
import sys

import pytest
from conftest import REPOSITORY

from common import pydoc_data
from common.errors import UserError
from tools import results


@pytest.fixture(scope="module")
def real():
    """bench/real.py: bench/ is a folder of programs."""
    sys.path.insert(0, str(REPOSITORY / "bench"))
    import real

    sys.path.remove(str(REPOSITORY / "bench"))
    return real


@pytest.mark.slow
def test_a_run_of_the_plain_loop_and_of_a_project_and_one_that_fails(real, tmp_path, monkeypatch):
    rows = pydoc_data.rows()[:60]
    lines = [json.dumps({"prompt": row["prompt"], "response": row["response"]}) + "\n" for row in rows]
    (tmp_path / "gsm8k-train.jsonl").write_text("".join(lines))
    monkeypatch.setattr(real, "SEEDS", ("42",))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The task's settings, made small.
    small = ["data.eval_rows=8", "data.max_length=64", "train.global_batch_size=8", "train.micro_batch_size=2",
             "train.warmup_steps=1", "eval.generate_rows=2", "eval.max_new_tokens=4"]  # fmt: skip
    monkeypatch.setattr(real, "KILL_AT", 1)
    monkeypatch.setattr(real, "CHECKPOINT_EVERY", 1)
    names = ["plain", "pytorch-ddp", "pytorch-ddp killed", "llm-foundry-finetune"]
    call = ["real.py", "--data-dir", str(tmp_path), "--precisions", "fp32", "--model", "tiny:llama", "--steps", "3",
            "--results", str(tmp_path / "results"), "--logs", str(tmp_path / "logs")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*call, "--tasks", "messages", "--projects", *names, "--set", *small])
    real.main()
    record = json.loads((tmp_path / "results/messages-fp32.json").read_text())
    plain, ddp = record["plain"]["42"], record["projects"]["pytorch-ddp"]
    assert ddp["status"] == "completed" and len(ddp["losses"]) == 3
    assert ddp["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    for when in ("eval_loss_before", "eval_loss_after"):
        assert ddp[when] == pytest.approx(plain[when], rel=1e-5)
    assert ddp["evaluation"]["fine_tuned"]["loss"] == pytest.approx(ddp["eval_loss_after"], rel=1e-5)
    assert ddp["evaluation"]["base"]["rouge_l"] >= 0 and len(ddp["samples"]) == real.SAMPLES
    start = "pytorch-ddp/launch.sh --config bench/tasks/messages.yaml"
    assert ddp["command"].startswith(f"{start} data.name=messages.jsonl train.precision=fp32")
    assert ddp["environment"]["world_size"] == 2
    killed = record["projects"]["pytorch-ddp killed"]
    assert killed["killed_at"] >= 1 and killed["losses"] == ddp["losses"]
    assert killed["eval_loss_after"] == ddp["eval_loss_after"]
    foundry = record["projects"]["llm-foundry-finetune"]
    assert foundry["status"] == "not offered" and "data.format=messages" in foundry["error"]
    assert (tmp_path / "results/losses.png").stat().st_size > 10_000

    # What a record has is kept; a project that fails is recorded, and ends nothing.
    logged = (tmp_path / "logs").stat().st_mtime_ns
    real.main()
    assert json.loads((tmp_path / "results/messages-fp32.json").read_text()) == record
    assert (tmp_path / "logs").stat().st_mtime_ns == logged
    monkeypatch.setattr(sys, "argv", [*call, "--tasks", "gsm8k", "--projects", "pytorch-ddp"])  # 200 rows held out
    real.main()
    failed = json.loads((tmp_path / "results/gsm8k-fp32.json").read_text())["projects"]["pytorch-ddp"]
    assert failed["status"] == "failed" and failed["losses"] == []
    assert failed["error"].startswith("error: data.name=") and "data.eval_rows=200" in failed["error"]


def write(folder, task, precision, plain, projects):
    """A record as bench/real.py writes it: held-out losses of the plain loop and of projects (None: failed)."""
    machine = {"gpus": [{"name": "GPU X"}] * 2, "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
               "git_commit": "0123456789abcdef"}  # fmt: skip
    runs = {
        name: {"status": "completed" if loss else "failed", "eval_loss_before": 2.0, "eval_loss_after": loss,
               "losses": [2.0, 1.5 * (1 + step)], "date": "2026-01-02", "environment": machine,
               "evaluation": {"base": {"perplexity": 7.39, "rouge_l": 0.1},
                              "fine_tuned": {"perplexity": 3.0, "rouge_l": 0.25}}}
        for name, (loss, step) in projects.items()
    }  # fmt: skip
    record = {
        "task": task,
        "precision": precision,
        "plain": {
            seed: {"status": "completed", "eval_loss_before": 2.0, "eval_loss_after": loss, "losses": [2.0, 1.5]}
            for seed, loss in plain.items()
        },
        "projects": runs,
    }
    (folder / f"{task}-{precision}.json").write_text(json.dumps(record))


def cells(text: str, first: str) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return next(row for row in rows if row[0] == first)


def test_the_tables_say_what_lies_outside_of_the_plain_loops_spread_and_what_failed(tmp_path):
    projects = {"ray-train": (1.27, 1e-4), "pytorch-ddp": (1.205, 0.002), "deepspeed-offload": (None, 0.0)}
    write(tmp_path, "gsm8k", "bf16", {"42": 1.20, "1": 1.22, "2": 1.21}, projects)
    write(tmp_path, "abstracts", "fp16", {"42": 3.20}, {"pytorch-ddp": (3.2, 0.0)})
    losses = results.real_losses(tmp_path)
    assert cells(losses, "held-out loss")[1:] == ["abstracts, fp16", "GSM8K, bf16"]
    assert cells(losses, "before training")[1:] == ["2.0000", "2.0000"]
    assert cells(losses, "plain loop, one GPU, five orders of the rows, 95%")[2] == "1.1603 to 1.2597"
    assert cells(losses, "`pytorch-ddp`")[1:] == ["3.2000", "1.2050"]
    assert cells(losses, "`ray-train`")[1:] == ["–", "1.2700 (0.01 outside)"]
    assert cells(losses, "`deepspeed-offload`")[1:] == ["–", "failed"]
    assert "2 × GPU X, torch 2.11.0, transformers 5.17.0; 2026-01-02, commit 0123456789" in losses
    assert losses.index("`pytorch-ddp`") < losses.index("`ray-train`")
    assert cells(results.real_closeness(tmp_path), "`pytorch-ddp`")[2] == "2e-03"
    assert results.real_killed(tmp_path) == ""
    answers = results.real_answers(tmp_path)
    assert cells(answers, "before training")[2] == "7.39 / 0.100"
    assert cells(answers, "`pytorch-ddp`")[2] == "3.00 / 0.250"


def test_killed_runs_have_a_table_of_their_own(tmp_path):
    write(tmp_path, "gsm8k", "bf16", {"42": 1.20, "1": 1.22, "2": 1.21}, {"pytorch-ddp": (1.2, 0.0)})
    path = tmp_path / "gsm8k-bf16.json"
    record = json.loads(path.read_text())
    whole = record["projects"]["pytorch-ddp"]
    record["projects"]["pytorch-ddp killed"] = whole | {"killed_at": 1, "losses": [2.0, 1.515], "eval_loss_after": 1.27}
    for seed, last in (("1", 1.8), ("2", 1.65)):
        record["plain"][seed]["losses"] = [2.0, last]
    path.write_text(json.dumps(record))
    table = results.real_killed(tmp_path)
    row = ["`pytorch-ddp`", "GSM8K, bf16", "1 of 2", "1.2700 (0.01 outside)", "1.2000", "1.0%"]
    assert cells(table, "`pytorch-ddp`") == row and "orders are 10.0% to 20.0% apart" in table
    assert "killed" not in results.real_losses(tmp_path)


def test_without_records_the_page_says_so(tmp_path):
    assert "Not measured yet" in results.real_losses(tmp_path)
    assert results.real_closeness(tmp_path) == results.real_answers(tmp_path) == ""


@pytest.mark.parametrize("task", ["abstracts", "gsm8k", "messages", "pydoc"])
def test_every_project_takes_the_tasks_settings(real, task):
    from common.config import BaseConfig, load_config

    assert task == "pydoc" or (task in real.TASKS and task in results.REAL_TASKS)
    try:
        cfg = load_config(BaseConfig, REPOSITORY / real.task_file(task), [])
    except UserError as error:
        pytest.fail(str(error))
    assert cfg.model.name == "smollm2" and cfg.runtime.gpu_memory_limit_gib == 14.7
    for processes in (1, 2, 4):
        assert cfg.train.global_batch_size % (cfg.train.micro_batch_size * processes) == 0
