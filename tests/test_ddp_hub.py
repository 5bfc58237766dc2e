"""pytorch-ddp's shipped config.yaml against a Hub on this machine: download, train, upload, refusals, secrets."""

import json
import sqlite3
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from launching import environment, error_line, metrics, run

PROJECT = "pytorch-ddp"
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.tensor([AutoTokenizer.from_pretrained(sys.argv[1])("What does json.dumps do?")["input_ids"]])
with torch.no_grad():
    print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()(ids).logits.double().sum().item())
"""


def load(name: str, variables: dict[str, str]) -> float:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, name], env=environment(**variables), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
def test_the_shipped_configuration_downloads_trains_and_uploads(hub, tmp_path):
    variables = hub.environment(tmp_path / "home", token="hf_writer")
    hub.fault(503, method="GET", path_contains="/api/models/writer", times=1)
    output = run(
        PROJECT, "train.max_steps=3", "hub.repo_id=writer/abstracts", f"output_dir={tmp_path}/runs/first",
        config="config.yaml", **variables,
    )  # fmt: skip
    assert "writer/abstracts" in output
    losses = [record["loss"] for record in metrics(tmp_path / "runs/first") if "loss" in record]
    assert len(losses) == 3 and losses[-1] < losses[0]
    summary = json.loads((tmp_path / "runs/first/summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    uploaded = load("writer/abstracts", hub.environment(tmp_path / "elsewhere", token="hf_writer"))
    assert uploaded == load(str(tmp_path / "runs/first/model"), {})
    card = (hub.root / "models/writer/abstracts/README.md").read_text()
    assert "Qwen/Qwen2-0.5B-Instruct" in card and "ash001/arxiv-abstract" in card

    with sqlite3.connect(tmp_path / "runs/mlflow.db") as database:
        logged = database.execute("select count(*) from metrics where key = 'loss'").fetchone()[0]
        status = database.execute("select status from runs").fetchall()
    assert logged == 3 and status == [("FINISHED",)]

    # The token is in nothing that the run wrote or printed.
    assert "hf_writer" not in output
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 15 and not [path for path in written if b"hf_writer" in path.read_bytes()]


@pytest.mark.slow
def test_a_gated_model_and_a_token_without_rights_stop_before_training(hub, tmp_path):
    gated = ["model.name=meta-llama/Llama-3.2-1B-Instruct", f"output_dir={tmp_path}/run", "train.max_steps=1"]
    options = {"config": "config.yaml", "processes": 1, "exit_code": 2}
    line = error_line(run(PROJECT, *gated, **options, **hub.environment(tmp_path / "a")))
    assert "meta-llama/Llama-3.2-1B-Instruct is gated" in line and "HF_TOKEN" in line
    line = error_line(run(PROJECT, *gated, **options, **hub.environment(tmp_path / "b", token="hf_stranger")))
    assert "no access yet" in line and "hf_stranger" not in line
    requests = len(hub.requests)
    push = ["hub.repo_id=reader/model", f"output_dir={tmp_path}/run"]
    line = error_line(run(PROJECT, *push, **options, **hub.environment(tmp_path / "c", token="hf_reader")))
    assert "hub.repo_id=reader/model" in line and "may not write" in line
    assert len(hub.requests) == requests + 1  # found out before anything was downloaded
    line = error_line(run(PROJECT, "model.name=Qwen/Qwen9", *gated[1:], **options, **hub.environment(tmp_path / "d")))
    assert "model.name=Qwen/Qwen9" in line


@pytest.mark.slow
def test_a_failing_hub_is_asked_again_and_a_failed_upload_loses_nothing(hub, tmp_path):
    settings = ["train.max_steps=1", "hub.repo_id=writer/lost", f"output_dir={tmp_path}/run", "tracking.backend=none"]
    hub.fault(502, method="HEAD", path_contains="Qwen2-0.5B-Instruct", times=2)
    hub.fault("drop", method="POST", path_contains="/commit/", times=50)
    variables = hub.environment(tmp_path / "home", token="hf_writer")
    output = run(PROJECT, *settings, config="config.yaml", processes=1, **variables)
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "completed"
    assert (tmp_path / "run/model/model.safetensors").exists()
    warning = next(line for line in output.splitlines() if "was not uploaded" in line)
    assert "hf upload writer/lost" in warning

    hub.fault(503, path_contains="Qwen2-0.5B-Instruct", times=1000)
    options = {"config": "config.yaml", "processes": 1, "exit_code": 2}
    line = error_line(run(PROJECT, *settings, **options, **hub.environment(tmp_path / "new", token="hf_writer")))
    assert "Qwen/Qwen2-0.5B-Instruct" in line


@pytest.mark.slow
def test_make_demo(tmp_path):
    """The demo as its user types it: trains, evaluates, and says where everything is."""
    done = subprocess.run(
        ["make", "demo"], cwd=REPOSITORY, env=environment() | {"VIRTUAL_ENV": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run_dir = REPOSITORY / "runs/pytorch-ddp/demo"
    figures = json.loads((run_dir / "eval.json").read_text())
    summary = json.loads((run_dir / "summary.json").read_text())
    assert figures["fine_tuned"]["loss"] < figures["base"]["loss"] - 1.5
    assert figures["base"]["loss"] == pytest.approx(summary["eval_loss_before"], rel=1e-9)
    assert figures["fine_tuned"]["loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-9)
    assert (
        summary["status"] == "completed" and json.loads((run_dir / "environment.json").read_text())["world_size"] == 2
    )
    assert (run_dir / "plots/loss.png").stat().st_size > 10_000 and (run_dir / "samples.md").exists()
    assert "bits per byte" in done.stdout and "Try next" in done.stdout and "step/s" in done.stderr
    with sqlite3.connect(run_dir.parent / "mlflow.db") as database:
        assert (
            database.execute("select count(*) from runs where name = 'demo' and status = 'FINISHED'").fetchone()[0] >= 1
        )
