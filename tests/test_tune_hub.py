"""ray-tune's shipped config.yaml against a Hub on this machine: download, search, upload, secrets."""

import json

import pytest
from launching import error_line, run
from test_ddp_hub import load

PROJECT = "ray-tune"
# Only the budget and the number of trials are changed; the least budget with a rung and the warm-ups below it.
SMALL = ["search.trials=2", "train.max_steps=53"]


@pytest.mark.slow
def test_the_shipped_configuration_downloads_searches_and_uploads(hub, tmp_path):
    variables = hub.environment(tmp_path / "home", token="hf_writer")
    settings = [*SMALL, "hub.repo_id=writer/tuned", f"output_dir={tmp_path}/runs/first"]
    output = run(PROJECT, *settings, config="config.yaml", **variables)
    summary = json.loads((tmp_path / "runs/first/summary.json").read_text())
    assert summary["status"] == "completed" and summary["search"]["trials"] == 2
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    uploaded = load("writer/tuned", hub.environment(tmp_path / "elsewhere", token="hf_writer"))
    assert uploaded == load(str(tmp_path / "runs/first/model"), {})
    card = (hub.root / "models/writer/tuned/README.md").read_text()
    assert "Qwen/Qwen2-0.5B-Instruct" in card and "stanfordnlp/imdb" in card
    rate = summary["search"]["best_parameters"]["learning_rate"]
    assert f"| learning rate | {rate:g}" in card
    # The token is in nothing that the search wrote or printed.
    assert "hf_writer" not in output
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 30 and not [path for path in written if b"hf_writer" in path.read_bytes()]


@pytest.mark.slow
def test_an_unknown_data_set_and_a_token_without_rights_stop_before_the_search(hub, tmp_path):
    options = {"config": "config.yaml", "exit_code": 2}
    where = [*SMALL, f"output_dir={tmp_path}/run"]
    line = error_line(run(PROJECT, *where, "data.name=stanfordnlp/imbd", **options, **hub.environment(tmp_path / "a")))
    assert "data.name=stanfordnlp/imbd" in line
    push = [*where, "hub.repo_id=reader/model"]
    line = error_line(run(PROJECT, *push, **options, **hub.environment(tmp_path / "b", token="hf_reader")))
    assert "hub.repo_id=reader/model" in line and "may not write" in line
    assert not (tmp_path / "run/trials").exists()
