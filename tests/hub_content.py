"""What the tests' Hub serves: the published models and datasets of the seven projects, tiny weights and few rows.

File kinds, every field of config.json and generation_config.json, the kind of tokenizer, special tokens and the chat
template are those of the published repository. Only sizes differ, and token ids, which follow from the vocabulary.

python tests/hub_content.py FOLDER && python tests/hub_server.py --root FOLDER
"""

import io
import json
import shutil
import sys
from pathlib import Path

import datasets
import torch
from hub_server import HubServer
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

from common import pydoc_data
from common.models import QWEN2_WORDS

GATED = {"meta-llama/Llama-3.2-1B-Instruct": ["reader", "writer"]}  # and who was granted access
TOKENS = {"hf_reader": ("reader", "read"), "hf_writer": ("writer", "write"), "hf_stranger": ("stranger", "write")}

LAYERS, WIDTH, HEADS = 4, 64, 4
VOCABULARY = 2000  # entries that are learned; special tokens are added to them
PYTHON_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"
LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def fill(hub: HubServer, folder: Path) -> None:
    """Build every model and dataset of the seven projects in `folder` and hand them to `hub`."""
    for name, build in MODELS.items():
        target = folder / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        build(target)
        _write(target / ".gitattributes", "*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        _write(target / "README.md", f"# {name}\n\nThe base model's card.\n")
        hub.add_model(name, target)
    rows = pydoc_data.rows()
    abstracts = [row["text"] for row in rows]
    abstracts[100] = abstracts[2000] = " \n"  # the published dataset has blank rows
    hub.add_dataset("ash001/arxiv-abstract", {"train.jsonl": _jsonl({"text": text} for text in abstracts)})
    dolly = (  # as published, three in ten rows have a text that the answer is in
        {"instruction": row["prompt"], "context": row["text"] if i % 10 < 3 else "", "response": row["response"]}
        | {"category": "closed_qa" if i % 10 < 3 else "open_qa"}
        for i, row in enumerate(rows)
    )
    hub.add_dataset("databricks/databricks-dolly-15k", {"databricks-dolly-15k.jsonl": _jsonl(dolly)})
    splits = {"train": rows[:2000], "test": rows[2000:2800], "unsupervised": rows[2800:]}
    imdb = {f"plain_text/{split}-00000-of-00001.parquet": _imdb(part, split) for split, part in splits.items()}
    hub.add_dataset("stanfordnlp/imdb", imdb | {"README.md": IMDB_CARD.encode()})


# ---- Models ----------------------------------------------------------------------------------------------------------


def llama(target: Path) -> None:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    names += ["<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"]
    names += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    tokenizer = _byte_level(LLAMA3_WORDS, last=names)
    ids = {name: tokenizer.token_to_id(name) for name in names}
    begin = names[0]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, ids[begin])]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    special = {"bos_token": begin, "eos_token": "<|eot_id|>"}  # and no token for padding
    _json(target / "special_tokens_map.json", {role: _special(name) for role, name in special.items()})
    _json(
        target / "tokenizer_config.json",
        special
        | {
            "added_tokens_decoder": {str(ids[name]): _added(name) for name in names},
            "chat_template": LLAMA3_TEMPLATE,
            "clean_up_tokenization_spaces": True,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    ends = [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids[begin],
        "eos_token_id": ends,
        "head_dim": WIDTH // HEADS,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": 3 * WIDTH,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS // 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    generation = {"bos_token_id": ids[begin], "do_sample": True, "eos_token_id": ends, "temperature": 0.6, "top_p": 0.9}
    _json(target / "generation_config.json", generation | {"transformers_version": "4.45.0.dev0"})
    weights = _weights(config)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    _json(target / "config.json", config)
    _write(target / "LICENSE.txt", "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n")
    _write(target / "USE_POLICY.md", "**Llama 3.2** **Acceptable Use Policy**\n")
    (target / "original").mkdir()  # the same weights in their authors' format
    _json(target / "original/params.json", {"dim": WIDTH, "n_layers": LAYERS})
    torch.save({"norm.weight": weights["model.norm.weight"]}, target / "original/consolidated.00.pth")


def qwen2(target: Path) -> None:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(QWEN2_WORDS, last=names, normalizer=normalizers.NFC())
    ids = {name: tokenizer.token_to_id(name) for name in names}
    tokenizer.save(str(target / "tokenizer.json"))
    _vocabulary_and_merges(tokenizer, target, without=names)
    _json(
        target / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(ids[name]): _added(name) for name in names},
            "additional_special_tokens": names[1:],
            "bos_token": None,
            "chat_template": QWEN2_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": 3 * WIDTH,
        "max_position_embeddings": 32768,
        "max_window_layers": LAYERS,
        "model_type": "qwen2",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS // 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": tokenizer.get_vocab_size() + 45,  # padded, as the published one is by 290
    }
    _json(
        target / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "repetition_penalty": 1.1,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "transformers_version": "4.37.0",
        },
    )
    save_file(_weights(config), target / "model.safetensors", metadata={"format": "pt"})
    _json(target / "config.json", config)
    _write(target / "LICENSE", "Apache License\nVersion 2.0, January 2004\n")


def opt(target: Path) -> None:
    """Weights as a pickle in fp16, without safetensors; a tokenizer of the slow kind's files."""
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    _vocabulary_and_merges(_byte_level(PYTHON_WORDS, first=names), target)
    end = _special("</s>", normalized=True)
    special = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": _special("<pad>", normalized=True)}
    _json(target / "special_tokens_map.json", special)
    _json(
        target / "tokenizer_config.json",
        {"errors": "replace"}
        | {role: {**token, "__type": "AddedToken"} for role, token in special.items()}
        | {
            "add_prefix_space": False,
            "add_bos_token": True,
            "special_tokens_map_file": None,
            "name_or_path": "patrickvonplaten/opt-30b",
            "tokenizer_class": "GPT2Tokenizer",
        },
    )
    config = {
        "_name_or_path": "facebook/opt-1.3b",
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 4 * WIDTH,
        "hidden_size": WIDTH,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "model_type": "opt",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "transformers_version": "4.21.0.dev0",
        "use_cache": True,
        "vocab_size": VOCABULARY + 7,  # padded, as the published one is by 7
        "word_embed_proj_dim": WIDTH,
    }
    generation = {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    _json(target / "generation_config.json", generation | {"transformers_version": "4.27.0.dev0"})
    torch.save(_weights(config), target / "pytorch_model.bin")
    _json(target / "config.json", config)
    _write(target / "LICENSE.md", "OPT LICENSE AGREEMENT\n")
    for other in ("flax_model.msgpack", "tf_model.h5"):
        _write(target / other, "weights for another framework")


def bloomz(target: Path) -> None:
    """Weights as safetensors and as a pickle, under the names of the model without its head; no generation config."""
    names = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = _byte_level(BLOOM_WORDS, first=names)
    tokenizer.save(str(target / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _json(target / "special_tokens_map.json", special)
    _json(
        target / "tokenizer_config.json",
        special
        | {
            "name_or_path": "bigscience/tokenizer",
            "padding_side": "left",
            "special_tokens_map_file": None,
            "tokenizer_class": "BloomTokenizerFast",
        },
    )
    config = {
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["BloomForCausalLM"],
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": WIDTH,
        "n_inner": None,
        "n_layer": LAYERS,
        "num_attention_heads": HEADS,
        "offset_alibi": 100,
        "pad_token_id": 3,
        "pretraining_tp": 1,
        "seq_length": 2048,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "transformers_version": "4.20.0",
        "unk_token_id": 0,
        "use_cache": True,
        "vocab_size": VOCABULARY + 200,  # padded, as the published one is by 200
    }
    weights = _weights(config, torch.float16)
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    torch.save(weights, target / "pytorch_model.bin")
    _json(target / "config.json", config)


MODELS = {
    "Qwen/Qwen2-0.5B-Instruct": qwen2,
    "facebook/opt-1.3b": opt,
    "meta-llama/Llama-3.2-1B-Instruct": llama,
    "bigscience/bloomz-1b1": bloomz,
}


def _weights(config: dict, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Random weights by name, a tied output head left out, in the type that the configuration names."""
    dtype = dtype or getattr(torch, config["torch_dtype"])
    model_config = AutoConfig.for_model(**config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model_config)
    return {name: t.to(dtype).contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"}


def _byte_level(words: str, first: list[str] = (), last: list[str] = (), normalizer=None) -> Tokenizer:
    """A byte-level BPE tokenizer, with special tokens at the beginning or the end of its vocabulary."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(name, special=True) for name in first],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in pydoc_data.rows()[::4]], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in last])
    return tokenizer


def _vocabulary_and_merges(tokenizer: Tokenizer, target: Path, without: list[str] = ()) -> None:
    """vocab.json and merges.txt, as GPT-2's tokenizer has them."""
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = {text: n for text, n in model["vocab"].items() if text not in without}
    _write(target / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    _write(target / "merges.txt", "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))


def _special(name: str, normalized: bool = False) -> dict:
    return {"content": name, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def _added(name: str) -> dict:
    return _special(name) | {"special": True}


def assert_base_is_kept(base: Path, model: Path) -> None:
    """All that training does not change is in `model` as it is in `base`; config.json but for the weights' type."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    before, after = read(base), read(model)
    settings, base_settings = (json.loads(files.pop("config.json")) for files in (after, before))
    assert settings == base_settings | {"torch_dtype": "float32"}
    assert after.pop("README.md") != before.pop("README.md")
    weights = (".safetensors", ".bin", ".msgpack", ".h5", ".index.json", ".gitattributes")
    unchanged = {name: content for name, content in before.items() if not name.endswith(weights)}
    assert len(unchanged) >= 3
    assert {name: content for name, content in after.items() if not name.endswith(weights)} == unchanged
    assert all(name.startswith("model") for name in after.keys() - unchanged.keys())


# ---- Datasets --------------------------------------------------------------------------------------------------------

IMDB_CARD = """\
---
language: [en]
license: other
configs:
- config_name: plain_text
  data_files:
  - {split: train, path: plain_text/train-*}
  - {split: test, path: plain_text/test-*}
  - {split: unsupervised, path: plain_text/unsupervised-*}
  default: true
---
# IMDB
"""


def _imdb(rows: list[dict], split: str) -> bytes:
    """As IMDB is published: sorted by label; without labels in the split `unsupervised`."""
    labels = [-1 if split == "unsupervised" else int(i >= len(rows) // 2) for i in range(len(rows))]
    label = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    table = io.BytesIO()
    datasets.Dataset.from_dict({"text": [r["text"] for r in rows], "label": labels}, features).to_parquet(table)
    return table.getvalue()


def _jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _json(path: Path, content: dict) -> None:
    _write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    fill(HubServer(root), root / "made")
