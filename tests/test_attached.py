"""A model that Kaggle has attached, in all the places where Kaggle puts one, is found by its name on the Hub."""

import pytest
from hub_content import qwen2

from common import attached, models
from common.config import ModelConfig

QWEN2, LLAMA = "Qwen/Qwen2-0.5B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
PLACES = [  # as public notebooks have them
    (LLAMA, "llama-3.2/transformers/1b-instruct/1"),
    (LLAMA, "models/metaresearch/llama-3.2/transformers/1b-instruct/1"),
    (QWEN2, "qwen2/transformers/0.5b-instruct/1"),
    (QWEN2, "qwen2/transformers/qwen2-0.5b-instruct/1"),
    (QWEN2, "models/somebody/qwen2-0.5b-instruct/transformers/default/3"),
    (QWEN2, "models/somebody/my-models/pytorch/default/1/Qwen2-0.5B-Instruct"),
    (QWEN2, "qwen2-0-5b-instruct"),  # a dataset's slug has no dots
    (QWEN2, "datasets/somebody/qwen2-0-5b-instruct"),
]


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(attached, "INPUT", tmp_path)
    attached.attached_model.cache_clear()
    yield tmp_path
    attached.attached_model.cache_clear()


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_it_is_found_where_kaggle_puts_it(inputs, name, place):
    for other in ("llama-3.2/transformers/1b/1", "qwen2/transformers/1.5b-instruct/1", "run/pytorch-ddp/model", "1"):
        (inputs / other).mkdir(parents=True)
        (inputs / other / "config.json").touch()
    assert attached.attached_model(name) is None
    attached.attached_model.cache_clear()
    (inputs / place).mkdir(parents=True)
    assert attached.attached_model(name) is None  # a GGUF, say: no config.json
    attached.attached_model.cache_clear()
    (inputs / place / "config.json").touch()
    assert attached.attached_model(name) == inputs / place
    assert attached.attached_model("facebook/opt-1.3b") is None
    assert attached.attached_model(QWEN2 if name == LLAMA else LLAMA) is None


def test_it_is_loaded_without_the_hub_and_the_run_keeps_the_models_name(inputs, monkeypatch):
    folder = inputs / "models/qwen-lm/qwen2/transformers/0.5b-instruct/1"
    folder.mkdir(parents=True)
    qwen2(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = ModelConfig(QWEN2)
    assert models.load_tokenizer(model)("We show that").input_ids
    assert models.load_model(model).config.model_type == "qwen2"
    assert models.base_folder(model) == folder
    assert model.name == QWEN2  # what a checkpoint and the model card say; the next session may have it from the Hub
