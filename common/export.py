"""`model/` in Hugging Face's form, written a part at a time, so that no process ever holds the whole model for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

FILE_SIZE = "1GB"  # of a safetensors file, and so of what the main process holds at a time


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by name; tied ones once, under their first name."""
    yield from model.named_parameters()
    saved = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


@torch.no_grad()
def write_model(model: PreTrainedModel, folder: Path, is_main: bool, gather: Callable[[Tensor], Tensor]) -> None:
    """Write config.json and safetensors files of at most FILE_SIZE (or one tensor, if that is larger) to `folder`.

    `gather` gives the whole of a sharded tensor, in fp32. It may be a collective: every rank calls this function,
    `gather` is called once for each tensor in the same order everywhere, and only the main process keeps the result and
    writes.
    """
    weights = dict(named_weights(model))
    # The model's own tensors may be 16-bit copies of what `gather` gives.
    empty = {name: torch.empty(t.shape, dtype=torch.float32, device="meta") for name, t in weights.items()}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=FILE_SIZE)
    if is_main:
        folder.mkdir(parents=True)
        # FSDP makes a class of its own out of a model's; the name to be found again is that of transformers'.
        classes = (cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
        model.config.architectures = [next(classes, type(model)).__name__]
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    for file, names in plan.filename_to_tensors.items():
        part = {}
        for name in names:
            whole = gather(weights[name])
            if is_main:
                part[name] = whole.cpu().contiguous()
            del whole
        if is_main:
            save_file(part, folder / file, metadata={"format": "pt"})
    if is_main and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def export(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    is_main: bool = True,
    gather: Callable[[Tensor], Tensor] = Tensor.detach,
) -> None:
    """Write model, tokenizer and model card in the place of `folder`, which is a whole one or none at any time.

    Every rank calls this; `gather` as in `write_model`.
    """
    partial = folder.with_name(f".writing-{folder.name}")
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
    write_model(model, partial, is_main, gather)
    if is_main:
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
