"""ray-train's shipped config.yaml against a Hub on this machine; no token in what Ray keeps."""

import contextlib
import json
from pathlib import Path

import psutil
import pytest
import torch
from launching import metrics, start, wait_for_step
from transformers import AutoModelForCausalLM, AutoTokenizer

PROJECT = "ray-train"
TOKEN = b"hf_writer"


def files_with_token(folder: Path) -> tuple[int, list[Path]]:
    """How many files there are below `folder`, and which of them hold the token."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # Ray is at work there
            if TOKEN in path.read_bytes():
                found.append(path)
    return len(files), found


@pytest.mark.slow
def test_the_shipped_configuration_downloads_trains_and_uploads(hub, tmp_path):
    variables = hub.environment(tmp_path / "home", token=TOKEN.decode()) | {"RAY_AUTH_MODE": "disabled"}
    folder = tmp_path / "runs/first"
    process = start(
        PROJECT, "train.max_steps=3", "hub.repo_id=writer/bloomz", f"output_dir={folder}", config="config.yaml",
        **variables,
    )  # fmt: skip
    wait_for_step(process, folder, 1, seconds=280)
    # Ray's own folder: its logs, its sockets, what it was told of the job. It is gone at the end.
    (raylet,) = (p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "raylet")
    argument = next(a for a in raylet.cmdline() if a.startswith("--raylet_socket_name="))
    count, found = files_with_token(Path(argument.partition("=")[2]).parents[1])
    assert count > 10 and not found
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output

    losses = [record["loss"] for record in metrics(folder) if "loss" in record]
    assert len(losses) == 3
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["eval_loss_after"] < summary["eval_loss_before"]
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder / "model")("This film is")["input_ids"]])
    uploaded = hub.root / "models/writer/bloomz"
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in (folder / "model", uploaded)
        )
    assert torch.equal(ours, theirs)
    card = (uploaded / "README.md").read_text()
    assert "bigscience/bloomz-1b1" in card and "stanfordnlp/imdb" in card
    assert list((tmp_path / "runs").rglob("*.wandb")), "no offline W&B run"
    assert TOKEN.decode() not in output
    count, found = files_with_token(tmp_path / "runs")
    assert count > 15 and not found
