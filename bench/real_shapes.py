"""Model folders with the real shapes, to measure speed and memory without the Hub.

    python bench/real_shapes.py Qwen/Qwen2-0.5B-Instruct FOLDER TEXT.jsonl

writes `config.json` (the published architecture) and a byte-level BPE tokenizer trained on TEXT.jsonl. Train it with
`model.name=FOLDER model.random_weights=true`: speed and memory do not depend on the weights' values.

    python bench/real_shapes.py --weights FOLDER

adds random weights in bf16, as most are published: a run then reads them as it would read those of the Hub. They are
the same each time on one kind of device, so that runs of different days compare.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# The fields of each published config.json that decide shapes and arithmetic.
SHAPES = {
    "Qwen/Qwen2-0.5B-Instruct": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "facebook/opt-1.3b": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "word_embed_proj_dim": 2048,
        "activation_function": "relu", "do_layer_norm_before": True, "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.2-1B-Instruct": {  # but for rope_scaling, which is only arithmetic on the positions
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "hidden_act": "silu", "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "bigscience/bloomz-1b1": {
        "model_type": "bloom", "vocab_size": 250880, "hidden_size": 1536, "n_layer": 24, "n_head": 16,
        "layer_norm_epsilon": 1e-5, "apply_residual_connection_post_layernorm": False,
    },
}  # fmt: skip
VOCABULARY = 32000  # ids above it are never drawn; the head computes all of the model's vocabulary all the same


def write_model_folder(name: str, folder: Path, texts: list[str]) -> None:
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    end = "<|endoftext|>"
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, VOCABULARY, special_tokens=[end], show_progress=False)
    # No padding token, as published: its embedding would be zero. A sequence that begins with it would be zero in every
    # layer, and each RMSNorm would multiply its gradient by a thousand.
    config.bos_token_id = config.eos_token_id = tokenizer.token_to_id(end)
    config.pad_token_id = None
    config.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=end, pad_token=end).save_pretrained(folder)


def read_texts(path: Path) -> list[str]:
    # Not splitlines(): a text may hold U+2028, which ends no line of JSON.
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]
    return ["\n".join(str(value) for value in row.values()) for row in rows]


def write_weights(folder: Path) -> None:
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU draws a billion values in half a minute
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.bfloat16().save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1] == "--weights":
        write_weights(Path(sys.argv[2]))
    else:
        model_name, target, text_file = sys.argv[1:]
        write_model_folder(model_name, Path(target), read_texts(Path(text_file)))
