"""What the models of the shipped config.yaml files ask for: one is gated, one is a pickle.

That each config.yaml trains as it is shipped, but for the number of steps, is in test_notebooks.py.
"""

import json
import pickle

import pytest
import torch
from hub_content import MODELS, assert_base_is_kept
from launching import error_line, run
from transformers import AutoModelForCausalLM

from common.config import DataConfig, ModelConfig
from common.export import Export
from common.loss import check_loss, chunked_losses
from common.models import load_model, load_model_config, load_tokenizer

SPECIAL = {  # BOS, EOS and padding of the tokenizer, and whether it puts BOS before a text
    "Qwen/Qwen2-0.5B-Instruct": (None, "<|im_end|>", "<|endoftext|>", False),
    "facebook/opt-1.3b": ("</s>", "</s>", "<pad>", True),
    "meta-llama/Llama-3.2-1B-Instruct": ("<|begin_of_text|>", "<|eot_id|>", None, True),
    "bigscience/bloomz-1b1": ("<s>", "</s>", "<pad>", False),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_is_read_trained_in_fp32_and_exported_with_its_own_files(hub_root, name, tmp_path):
    folder = hub_root / "models" / name
    base = ModelConfig(str(folder))
    tokenizer = load_tokenizer(base)
    begin, end, pad, begins = SPECIAL[name]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (begin, end, pad or end)
    ids = tokenizer("What it does")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) is begins and tokenizer.eos_token_id not in ids[1:]
    config = load_model_config(base, DataConfig(max_length=1024))
    assert len(tokenizer) <= config.vocab_size
    assert config.vocab_size > len(tokenizer) or name.startswith("meta-llama")  # the others are padded
    assert {getattr(config, key, 0.0) for key in ("dropout", "attention_dropout", "hidden_dropout")} == {0.0}

    model = load_model(base).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32} and check_loss(model) is chunked_losses
    assert next(load_model(base, dtype="auto").parameters()).dtype in (torch.bfloat16, torch.float16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    Export(base, tmp_path / "model").write(model, "card", torch.Tensor.detach)
    assert_base_is_kept(folder, tmp_path / "model")
    ids = torch.tensor([ids])
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(reloaded(ids).logits, model(ids).logits)
    exported = load_tokenizer(ModelConfig(str(tmp_path / "model")))
    assert exported("What it does")["input_ids"] == tokenizer("What it does")["input_ids"]
    base_model = AutoModelForCausalLM.from_pretrained(folder)
    assert reloaded.generation_config.to_dict() == base_model.generation_config.to_dict()


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


def test_the_stand_ins_have_the_published_settings(hub_root):
    def read(name: str, file: str) -> dict:
        return json.loads((hub_root / "models" / name / file).read_text())

    llama = "meta-llama/Llama-3.2-1B-Instruct"
    generation = read(llama, "generation_config.json")
    assert len(generation["eos_token_id"]) == 3 and "pad_token_id" not in generation and generation["do_sample"]
    assert read(llama, "config.json")["rope_scaling"]["rope_type"] == "llama3"
    assert "strftime_now" in read(llama, "tokenizer_config.json")["chat_template"]
    generation = read("Qwen/Qwen2-0.5B-Instruct", "generation_config.json")
    assert len(generation["eos_token_id"]) == 2 and generation["repetition_penalty"] == 1.1
    opt = read("facebook/opt-1.3b", "config.json")
    assert (opt["dropout"], opt["pad_token_id"], opt["prefix"], opt["torch_dtype"]) == (0.1, 1, "</s>", "float16")
    bloomz = hub_root / "models/bigscience/bloomz-1b1"
    assert read("bigscience/bloomz-1b1", "config.json")["pad_token_id"] == 3
    assert not (bloomz / "generation_config.json").exists() and (bloomz / "pytorch_model.bin").exists()


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
