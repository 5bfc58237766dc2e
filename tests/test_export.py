"""model/ is what transformers would have written, in parts of a bounded size."""

import json

import pytest
import torch
from conftest import FAMILIES
from transformers import AutoModelForCausalLM

from common import export
from common.config import ModelConfig
from common.models import load_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file_size", ["1GB", "100KB"])
def test_the_export_reloads_to_the_same_logits(family, file_size, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "FILE_SIZE", file_size)
    model = load_model(ModelConfig(f"tiny:{family}"), seed=3).eval()
    gathered = []

    def gather(tensor):
        gathered.append(tensor)
        return tensor.clone()

    export.write_model(model, tmp_path / "model", True, gather)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    ids = torch.arange(64).reshape(2, 32)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(ids).logits, model(ids).logits)
    assert type(reloaded) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
    names = [name for name, _ in export.named_weights(model)]
    assert len(gathered) == len(names) == len(set(names))  # a tied tensor once
    if file_size == "1GB":
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        largest = max(t.numel() for t in gathered) * 4
        assert len(files) > 2 and max(file.stat().st_size for file in files) < max(100_000, largest) + 10_000
        index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(names)


def test_other_ranks_take_part_and_write_nothing(tmp_path):
    model = load_model(ModelConfig("tiny:opt"))
    gathered = []
    export.write_model(model, tmp_path / "model", False, lambda tensor: gathered.append(tensor) or tensor)
    assert [id(t) for t in gathered] == [id(t) for _, t in export.named_weights(model)]
    assert not list(tmp_path.iterdir())


def test_sixteen_bit_weights_whose_masters_are_fp32_are_exported_in_fp32(tmp_path):
    model = load_model(ModelConfig("tiny:llama"))
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.half()
    by_tensor = {id(p): masters[name] for name, p in model.named_parameters()}
    export.write_model(model, tmp_path / "model", True, lambda tensor: by_tensor[id(tensor)])
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert all(torch.equal(p, masters[name]) for name, p in reloaded.named_parameters())
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
