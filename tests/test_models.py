"""Models: the tiny ones are the real classes, and what holds for a model holds after it was saved and loaded."""

import json

import pytest
import torch
from conftest import FAMILIES, refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import pydoc_data
from common.config import DataConfig, ModelConfig
from common.models import (
    TINY_SHAPES,
    architecture,
    checkpoint_activations,
    decoder_layers,
    empty_model,
    load_model,
    load_model_config,
    load_tokenizer,
    parameter_groups,
    repeat_grouped_heads,
)

CLASSES = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2DecoderLayer"),
    "llama": ("LlamaForCausalLM", "LlamaDecoderLayer"),
    "opt": ("OPTForCausalLM", "OPTDecoderLayer"),
    "bloom": ("BloomForCausalLM", "BloomBlock"),
}
TEXTS = [
    "What does os.path.join(a, *p) do?\n\n  Join two or more pathname components, inserting '/' as needed. It's 100%.",
    "Ünïcödé: naïve café, 你好 \U0001f600, zero\u200bwidth, e\u0301 \t tabs\r\n and 1234567890 digits",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    " leading and trailing ",
]


def tiny(family: str, seed: int = 1, **keys):
    return load_model(ModelConfig(f"tiny:{family}"), seed, **keys)


def ids(n: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 2048, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def lively(family):
    """Matrices far from zero: a fresh model with tied embeddings only ever repeats its last token."""
    model = tiny(family).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.2)
    return model


def test_a_tiny_model_is_the_real_class_with_tied_embeddings(family):
    model = tiny(family)
    assert type(model).__name__ == CLASSES[family][0]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert {p.dtype for p in tiny(family, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_weights_come_from_the_seed_and_draw_no_random_numbers_of_the_run(family):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = tiny(family, 1).state_dict(), tiny(family, 1).state_dict(), tiny(family, 2).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(*(weights[max(one, key=lambda n: one[n].numel())] for weights in (one, other)))


def test_nothing_is_dropped_at_random(family):
    model = tiny(family).train()
    dropouts = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert not any(dropouts.values()), dropouts
    assert torch.equal(model(ids()).logits, model(ids()).logits)


def test_dropout_of_a_saved_configuration_is_turned_off(tmp_path):
    config = load_model_config(ModelConfig("tiny:opt"))
    config.dropout, config.attention_dropout, config.layerdrop = 0.3, 0.2, 0.1
    config.save_pretrained(tmp_path)
    loaded = load_model_config(ModelConfig(str(tmp_path)))
    assert (loaded.dropout, loaded.attention_dropout, loaded.layerdrop) == (0, 0, 0)


def test_decoder_layers(family):
    layers = decoder_layers(tiny(family))
    assert [type(layer).__name__ for layer in layers] == [CLASSES[family][1]] * 4
    with refused("no list of decoder layers", "Linear"):
        decoder_layers(torch.nn.Linear(1, 1))
    with refused("no list of decoder layers"):
        decoder_layers(torch.nn.ModuleDict({"layers": torch.nn.ModuleList()}))


def test_activation_checkpointing_gives_the_same_gradients_without_a_warning(family, recwarn):
    plain, checkpointed = tiny(family).train(), tiny(family).train()
    checkpoint_activations(checkpointed)
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.modules())
    for model in (plain, checkpointed):
        model(ids(), labels=ids(), use_cache=False).loss.backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_model_without_activation_checkpointing_is_refused():
    model = tiny("opt")
    model.supports_gradient_checkpointing = False
    with refused("train.activation_checkpointing", "OPTForCausalLM", "false"):
        checkpoint_activations(model)


def test_an_empty_model_has_the_same_tensors_without_their_values(family):
    empty, full = empty_model(ModelConfig(f"tiny:{family}")), tiny(family)
    assert all(p.is_meta and p.dtype == torch.float32 for p in empty.parameters())
    for ours, theirs in (
        (empty.named_parameters(), full.named_parameters()),
        (empty.named_buffers(), full.named_buffers()),
    ):
        assert [(name, t.shape) for name, t in ours] == [(name, t.shape) for name, t in theirs]
    assert empty.get_output_embeddings().weight is empty.get_input_embeddings().weight


def test_the_architecture_in_words_tells_models_apart():
    config = load_model_config(ModelConfig("tiny:llama"))
    words = architecture(config)
    assert words == "llama: 4 layers of width 64/192, 4/2 heads, vocabulary 2048, tied"
    assert len({architecture(load_model_config(ModelConfig(f"tiny:{family}"))) for family in FAMILIES}) == 4
    config.tie_word_embeddings = False
    assert architecture(config) == words.replace("tied", "untied")


def test_a_saved_model_loads_to_the_same_logits_and_token_ids(family, tmp_path, lively):
    tokenizer = load_tokenizer(ModelConfig(f"tiny:{family}"))
    lively.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    with torch.no_grad():
        expected = lively(ids()).logits
        for model in (AutoModelForCausalLM.from_pretrained(tmp_path), load_model(ModelConfig(str(tmp_path))).eval()):
            assert type(model) is type(lively)
            assert torch.equal(model(ids()).logits, expected)
    texts = [*TEXTS, *(row["text"] for row in pydoc_data.rows()[::40])]
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(ModelConfig(str(tmp_path)))):
        assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
        assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert loaded.chat_template == tokenizer.chat_template


def test_the_tiny_tokenizer_gives_back_its_text_and_fits_the_model(family):
    tokenizer = load_tokenizer(ModelConfig(f"tiny:{family}"))
    config = load_model_config(ModelConfig(f"tiny:{family}"))
    assert len(tokenizer) == config.vocab_size
    assert config.eos_token_id == tokenizer.eos_token_id
    for text in TEXTS:
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(encoded) == text.replace("e\u0301", "é")
        assert max(encoded) < config.vocab_size
        begins = [tokenizer.bos_token_id] if family in ("llama", "opt") else []
        assert tokenizer(text)["input_ids"] == begins + encoded
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [2]


def test_a_tokenizer_without_a_pad_token_gets_eos_and_one_without_eos_is_refused(tmp_path):
    tokenizer = load_tokenizer(ModelConfig("tiny:bloom"))
    for name, removed in (("no-pad", ["pad_token"]), ("no-eos", ["pad_token", "eos_token"])):
        tokenizer.save_pretrained(tmp_path / name)
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        for key in removed:
            settings.pop(key)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / name / "special_tokens_map.json").unlink(missing_ok=True)
    loaded = load_tokenizer(ModelConfig(str(tmp_path / "no-pad")))
    assert loaded.pad_token_id == loaded.eos_token_id == 0
    with refused("model.name=", "no-eos", "end-of-sequence"):
        load_tokenizer(ModelConfig(str(tmp_path / "no-eos")))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("wanted", ["eager", "flash_attention_2"])
def test_the_attention_is_ours_to_choose_and_not_config_json_s(family, lively, tmp_path, key, wanted):
    lively.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: wanted}))
    loaded = load_model(ModelConfig(str(tmp_path))).eval()
    for model in (loaded, empty_model(ModelConfig(str(tmp_path)))):
        assert model.config._attn_implementation == ("eager" if family == "bloom" else "sdpa")  # BLOOM has no other
    assert torch.equal(loaded(ids()).logits, lively(ids()).logits)


@pytest.mark.parametrize("family", ["qwen2", "llama"], indirect=True)
def test_repeated_heads_change_nothing(family, lively):
    other = load_model(ModelConfig(f"tiny:{family}")).eval()
    other.load_state_dict(lively.state_dict())
    repeat_grouped_heads(other)
    assert other.config._attn_implementation == "sdpa_repeated_heads" != lively.config._attn_implementation

    outputs = [model(ids(), labels=ids()) for model in (lively, other)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits)
    for output in outputs:
        output.loss.backward()
    for (name, p), q in zip(lively.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)

    # A batch as generation has it: padded on the left, with a mask, one token at a time after the first pass.
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, :7], mask[2, :15] = 0, 0
    answers = []
    for model in (lively, other):
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        answers.append(model.generate(input_ids=ids() * mask, attention_mask=mask, **options))
    assert torch.equal(*answers)
    assert len(answers[0][:, 20:].unique()) > 3, "an answer of one token only proves little"
    alone = other.generate(input_ids=ids()[2:, 15:], attention_mask=mask[2:, 15:], **options)
    assert torch.equal(alone[0, 5:], answers[1][2, 20:]), "the padding is not attended to"


def test_random_weights_of_a_local_configuration(tmp_path):
    load_model_config(ModelConfig("tiny:llama")).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    drawn = load_model(ModelConfig(str(tmp_path), random_weights=True), seed=1)
    assert all(torch.equal(p, q) for p, q in zip(drawn.parameters(), tiny("llama", 1).parameters(), strict=True))
    with refused("model", str(tmp_path)):
        load_model(ModelConfig(str(tmp_path)), seed=1)


def test_a_model_that_cannot_be_had_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 8}))
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "not-a-model"}))
    with refused("model.name=", "vit", "not a causal language model"):
        load_model_config(ModelConfig(str(tmp_path / "vision")))
    for folder in ("empty", "unknown"):
        for load in (load_model_config, load_model):
            with refused(str(tmp_path / folder)):
                load(ModelConfig(str(tmp_path / folder)))


def edited(family: str, folder, edit) -> ModelConfig:
    """A saved tiny model whose tensors went through `edit`."""
    tiny(family).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, "auto"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_its_tensors_are_named(family, tmp_path, dtype):
    def norm(tensors):
        return min(name for name in tensors if "norm" in name and name.endswith("weight"))

    names = {}
    for kind, edit in {
        "missing": lambda tensors: names.update(missing=norm(tensors)) or tensors.pop(norm(tensors)),
        "unexpected": lambda tensors: tensors.update({"model.reward.weight": torch.ones(2)}),
        "of another shape": lambda tensors: (
            names.update({"of another shape": norm(tensors)}) or tensors.update({norm(tensors): torch.ones(3)})
        ),
    }.items():
        with refused("model.name=", f"{kind}: ", names.get(kind, ""), "choose a complete checkpoint"):
            load_model(edited(family, tmp_path / kind, edit), dtype=dtype)

    def tensors_of_a_layer(tensors):
        return sorted(name for name in tensors if ".1." in name)[:9]

    several = edited(
        family, tmp_path / "several", lambda tensors: [tensors.pop(n) for n in tensors_of_a_layer(tensors)]
    )
    with refused("missing: ", "and 6 more"):
        load_model(several, dtype=dtype)
    assert load_model(edited(family, tmp_path / "whole", lambda tensors: None), dtype=dtype)


def test_a_checkpoint_saved_while_its_head_was_tied_lacks_it_where_config_json_says_untied(tmp_path):
    base = edited("qwen2", tmp_path, lambda tensors: None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with refused("model.name=", "Qwen2ForCausalLM", "missing: lm_head.weight", "correct config.json"):
        load_model(base)


@pytest.mark.parametrize("role", ["pad_token", "bos_token", "eos_token", None])
def test_a_token_without_an_embedding_is_refused(role, tmp_path):
    tokenizer = load_tokenizer(ModelConfig("tiny:llama"))
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({role: "[NEW]"}) if role else tokenizer.add_tokens("[NEW]")
    tokenizer.save_pretrained(tmp_path)
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    roles = (role,) if role else ()
    with refused("model.name=", "'[NEW]' with id 2048", "2048 embeddings", "resize_token_embeddings", *roles):
        load_tokenizer(ModelConfig(str(tmp_path)))
    model.resize_token_embeddings(2112)  # padded beyond the tokenizer
    model.save_pretrained(tmp_path)
    assert len(load_tokenizer(ModelConfig(str(tmp_path)))) == 2049


def test_another_model_s_tokenizer_is_refused_and_a_special_token_that_no_text_gives_is_not(tmp_path):
    load_tokenizer(ModelConfig("tiny:qwen2")).save_pretrained(tmp_path)
    config = load_model_config(ModelConfig("tiny:qwen2"))
    config.vocab_size = 1000
    config.save_pretrained(tmp_path)
    with refused("id 2047", "1000 embeddings"):
        load_tokenizer(ModelConfig(str(tmp_path)))
    tokenizer = load_tokenizer(ModelConfig("tiny:qwen2"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    config.vocab_size = 2048
    config.save_pretrained(tmp_path)
    assert len(load_tokenizer(ModelConfig(str(tmp_path)))) == 2049


def test_max_length_is_compared_with_a_local_model_s_too(tmp_path):
    load_model_config(ModelConfig("tiny:opt")).save_pretrained(tmp_path)
    with refused("data.max_length=1025", str(tmp_path), "1024"):
        load_model_config(ModelConfig(str(tmp_path)), DataConfig(max_length=1025))


def test_matrices_decay_and_vectors_do_not(family):
    model = tiny(family)
    decaying, steady = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], steady["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for group in (decaying, steady) for p in group["params"]) == sorted(names.values())
    assert any("embed" in names[id(p)] for p in decaying["params"])
    assert all(names[id(p)].endswith("weight") for p in decaying["params"])
    assert all(
        "norm" in names[id(p)] or "ln_" in names[id(p)] or names[id(p)].endswith("bias") for p in steady["params"]
    )

    frozen = decoder_layers(model)[0].requires_grad_(False)
    trained = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert trained == names.keys() - {id(p) for p in frozen.parameters()}


def test_the_shapes_keep_what_matters_of_the_real_ones():
    for family in ("qwen2", "llama"):
        assert TINY_SHAPES[family]["num_key_value_heads"] < TINY_SHAPES[family]["num_attention_heads"]
