"""deepspeed-pipeline's shipped config.yaml against a Hub on this machine, where its model is gated."""

import json

import pytest
import torch
from launching import error_line, metrics, run
from transformers import AutoModelForCausalLM, AutoTokenizer

PROJECT = "deepspeed-pipeline"


@pytest.mark.slow
def test_the_shipped_configuration_downloads_trains_and_uploads(hub, tmp_path):
    variables = hub.environment(tmp_path / "home", token="hf_writer")
    folder = tmp_path / "runs/first"
    output = run(
        PROJECT, "train.max_steps=3", "hub.repo_id=writer/llama", f"output_dir={folder}",
        config="config.yaml", **variables,
    )  # fmt: skip
    losses = [record["loss"] for record in metrics(folder) if "loss" in record]
    assert len(losses) == 3 and losses[-1] < losses[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["eval_loss_after"] < summary["eval_loss_before"]
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder / "model")("We show that")["input_ids"]])
    uploaded = hub.root / "models/writer/llama"
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in (folder / "model", uploaded)
        )
    assert torch.equal(ours, theirs)
    card = (uploaded / "README.md").read_text()
    assert "meta-llama/Llama-3.2-1B-Instruct" in card and "ash001/arxiv-abstract" in card
    assert list((tmp_path / "runs").rglob("*.wandb")), "no offline W&B run"
    assert "hf_writer" not in output
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 15 and not [path for path in written if b"hf_writer" in path.read_bytes()]


@pytest.mark.slow
def test_the_gated_model_is_refused_with_where_to_ask_and_what_to_set(hub, tmp_path):
    options = {"config": "config.yaml", "processes": 1, "exit_code": 2}
    settings = ["train.max_steps=1", f"output_dir={tmp_path}/run"]
    line = error_line(run(PROJECT, *settings, **options, **hub.environment(tmp_path / "a")))
    assert "meta-llama/Llama-3.2-1B-Instruct is gated" in line and "HF_TOKEN" in line and "http" in line
    line = error_line(run(PROJECT, *settings, **options, **hub.environment(tmp_path / "b", token="hf_stranger")))
    assert "no access yet" in line and "hf_stranger" not in line
