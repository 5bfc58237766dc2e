"""llm-foundry-finetune's shipped config.yaml against a Hub on this machine; its OPT is a pickle, as it is published."""

import json

import pytest
import torch
from launching import metrics, run
from transformers import AutoModelForCausalLM

PROJECT = "llm-foundry-finetune"


@pytest.mark.slow
def test_the_shipped_configuration_downloads_trains_and_uploads(hub, tmp_path):
    folder = tmp_path / "runs/first"
    output = run(
        PROJECT, "train.max_steps=2", "hub.repo_id=writer/opt-dolly", f"output_dir={folder}",
        config="config.yaml", **hub.environment(tmp_path / "home", token="hf_writer"),
    )  # fmt: skip
    assert len([record for record in metrics(folder) if "loss" in record]) == 2  # of 85 steps of warm-up
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["eval_loss_after"] == pytest.approx(
        summary["eval_loss_before"], rel=1e-3
    )
    # The context of a question, where it has one, is in the prompt.
    rows = [json.loads(line) for line in (folder / "foundry/eval.jsonl").read_text().splitlines()]
    with_context = [row for row in rows if row["prompt"].count("\n") > 2 or len(row["prompt"]) > 200]
    assert 0.1 < len(with_context) / len(rows) < 0.5
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits
            for path in (folder / "model", hub.root / "models/writer/opt-dolly")
        )
    assert torch.equal(ours, theirs)
    card = (hub.root / "models/writer/opt-dolly/README.md").read_text()
    assert "facebook/opt-1.3b" in card and "databricks/databricks-dolly-15k" in card
    assert list((tmp_path / "runs").rglob("*.wandb")), "no offline W&B run"
    assert "hf_writer" not in output
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 15 and not [path for path in written if b"hf_writer" in path.read_bytes()]
