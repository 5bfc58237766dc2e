"""What the models of the shipped config.yaml files ask for: one is gated, one is a pickle.

That each config.yaml trains as it is shipped, but for the number of steps, is in test_notebooks.py.
"""

import pickle

import pytest
import torch
from launching import error_line, run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("project", "token", "advice"),
    [("deepspeed-offload", None, "HF_TOKEN"), ("deepspeed-pipeline", "hf_stranger", "no access yet")],
)
def test_the_gated_model_is_refused_with_where_to_ask_and_what_to_set(hub, tmp_path, project, token, advice):
    options = {"config": "config.yaml", "processes": 1, "exit_code": 2}
    settings = ["train.max_steps=1", f"output_dir={tmp_path}/run"]
    line = error_line(run(project, *settings, **options, **hub.environment(tmp_path / "home", token=token)))
    assert "meta-llama/Llama-3.2-1B-Instruct is gated" in line and advice in line and "http" in line
    assert "hf_stranger" not in line


class Intruder:
    """What a pickle can do that is loaded without `weights_only`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.slow
def test_a_pickle_that_would_run_code_is_not_loaded(hub, tmp_path):
    """OPT-1.3B is published as a pickle, without safetensors."""
    assert not list(hub.root.glob("models/facebook/opt-1.3b/*.safetensors"))
    folder, trace = tmp_path / "model", tmp_path / "it-ran"
    folder.mkdir()
    for file in hub.root.glob("models/facebook/opt-1.3b/*"):
        if file.is_file() and file.suffix in (".json", ".txt"):
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save({"model.decoder.embed_tokens.weight": Intruder(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "pytorch_model.bin", weights_only=True)
    settings = [f"model.name={folder}", f"output_dir={tmp_path}/run", "train.max_steps=1"]
    options = {"config": "config.yaml", "processes": 1, "exit_code": 2}
    line = error_line(run("pytorch-fsdp", *settings, **options, **hub.environment(tmp_path / "home")))
    assert str(folder) in line
    assert not trace.exists()
