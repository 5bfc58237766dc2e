"""pytorch-fsdp's shipped config.yaml against a Hub on this machine, where its model is a pickle, as it is published."""

import json
import pickle

import pytest
import torch
from launching import error_line, metrics, run
from transformers import AutoModelForCausalLM

PROJECT = "pytorch-fsdp"


@pytest.mark.slow
def test_the_shipped_configuration_downloads_trains_and_uploads(hub, tmp_path):
    assert not list(hub.root.glob("models/facebook/opt-1.3b/*.safetensors"))
    folder = tmp_path / "runs/first"
    output = run(
        PROJECT, "train.max_steps=3", "hub.repo_id=writer/opt", f"output_dir={folder}",
        config="config.yaml", **hub.environment(tmp_path / "home", token="hf_writer"),
    )  # fmt: skip
    losses = [record["loss"] for record in metrics(folder) if "loss" in record]
    assert len(losses) == 3  # of ten steps of warm-up: too few for the training loss to fall
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["eval_loss_after"] < summary["eval_loss_before"]
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits
            for path in (folder / "model", hub.root / "models/writer/opt")
        )
    assert torch.equal(ours, theirs)
    card = (hub.root / "models/writer/opt/README.md").read_text()
    assert "facebook/opt-1.3b" in card and "ash001/arxiv-abstract" in card
    assert list((tmp_path / "runs").rglob("*.wandb")), "no offline W&B run"
    assert "hf_writer" not in output
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 15 and not [path for path in written if b"hf_writer" in path.read_bytes()]


class Intruder:
    """What a pickle can do that is loaded without `weights_only`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.slow
def test_a_pickle_that_would_run_code_is_not_loaded(hub, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "it-ran"
    folder.mkdir()
    for file in hub.root.glob("models/facebook/opt-1.3b/*"):
        if file.is_file() and file.suffix in (".json", ".txt"):
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save({"model.decoder.embed_tokens.weight": Intruder(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "pytorch_model.bin", weights_only=True)
    settings = [f"model.name={folder}", f"output_dir={tmp_path}/run", "train.max_steps=1"]
    variables = hub.environment(tmp_path / "home")
    line = error_line(run(PROJECT, *settings, config="config.yaml", processes=1, exit_code=2, **variables))
    assert str(folder) in line
    assert not trace.exists()
