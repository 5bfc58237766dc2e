"""What pytorch-ddp makes of a Hub that refuses or fails, and its demo. Its config.yaml runs in test_notebooks.py."""

import json
import sqlite3
import subprocess

import pytest
from conftest import REPOSITORY
from hub_content import assert_base_is_kept
from launching import environment, error_line, run

PROJECT = "pytorch-ddp"


@pytest.mark.slow
def test_an_unknown_model_and_a_token_without_rights_stop_before_training(hub, tmp_path):
    settings = [f"output_dir={tmp_path}/run", "train.max_steps=1"]
    options = {"config": "config.yaml", "processes": 1, "exit_code": 2}
    push = [*settings, "hub.repo_id=reader/model"]
    line = error_line(run(PROJECT, *push, **options, **hub.environment(tmp_path / "a", token="hf_reader")))
    assert "hub.repo_id=reader/model" in line and "may not write" in line
    assert len(hub.requests) == 1  # found out before anything was downloaded
    line = error_line(run(PROJECT, *settings, "model.name=Qwen/Qwen9", **options, **hub.environment(tmp_path / "b")))
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
    assert_base_is_kept(hub.root / "models/Qwen/Qwen2-0.5B-Instruct", tmp_path / "run/model")
    warning = next(line for line in output.splitlines() if "was not uploaded" in line)
    assert "hf upload writer/lost" in warning

    hub.fault(503, path_contains="Qwen2-0.5B-Instruct", times=1000)
    options = {"config": "config.yaml", "processes": 1, "exit_code": 2}
    line = error_line(run(PROJECT, *settings, **options, **hub.environment(tmp_path / "new", token="hf_writer")))
    assert "Qwen/Qwen2-0.5B-Instruct" in line


@pytest.mark.slow
def test_make_demo(tmp_path):
    """The demo as its user types it: trains, evaluates, and prints where everything is."""
    done = subprocess.run(
        ["make", "demo"],
        cwd=REPOSITORY,
        env=environment(cold=True) | {"VIRTUAL_ENV": ""},
        capture_output=True,
        text=True,
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
    assert "bits per byte" in done.stdout and "Try next" in done.stdout
    assert "Training: 100% (500 of 500 steps)" in done.stdout
    with sqlite3.connect(run_dir.parent / "mlflow.db") as database:
        assert (
            database.execute("select count(*) from runs where name = 'demo' and status = 'FINISHED'").fetchone()[0] >= 1
        )
