"""Attention that stays inside each document of a block (common/packing.py), by every kernel of SDPA that takes a mask.

The mask [batch, 1, length, length] is made once per micro-batch and added to the scores of all layers: 0 for a key of
the same document that is not later, else the smallest number. A boolean mask would be turned into this form in every
layer. The memory-efficient kernel, which a T4 has, takes it as it is; the flash kernel takes none.

transformers finds documents by itself where positions restart, but not in every version and family that is trained
here; one that does not would attend across them silently. So the mask is explicit, and `check_documents` compares,
before training, what a small copy of the model computes for a block and for each of its documents alone.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.small_model import small_copies

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Settings that limit attention to nearby tokens, by the family's own mask, which ours replaces.
WINDOWS = ("sliding_window", "attention_chunk_size")
SMALL_WINDOW = 3
TRIED = (1, 6, 2, 1, 9, 1)  # lengths of the documents in the block that is tried


def document_inputs(model: nn.Module, position_ids: Tensor | None) -> dict[str, Tensor]:
    """What the forward of `model` takes besides the token ids. `position_ids` int64 [batch, length], from 0 in each
    document; None if rows are not packed.

    Without documents there is no mask: padding is on the right, where causal attention never looks, and without a mask
    PyTorch may use its fast causal kernels.
    """
    if position_ids is None:
        return {}
    device, dtype = position_ids.device.type, model.get_input_embeddings().weight.dtype
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    inputs = {"attention_mask": document_mask(position_ids, dtype), "position_ids": position_ids}
    # A family without positions would take them without complaint, or with a warning.
    return {name: inputs[name] for name in inputs if name in inspect.signature(model.forward).parameters}


def document_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the scores of attention, `dtype` [batch, 1, length, length], for queries × keys."""
    batch, length = position_ids.shape
    document = (position_ids == 0).cumsum(-1)
    seen = (document[:, :, None] == document[:, None, :]).tril_()
    # Rows that do not begin at a multiple of 8 would be copied by CUDA's kernels in every layer.
    rows = torch.zeros(batch, 1, length, -(-length // 8) * 8, dtype=dtype, device=position_ids.device)
    return rows[..., :length].masked_fill_(~seen[:, None], torch.finfo(dtype).min)


def restart_alibi(model: nn.Module) -> None:
    """Let BLOOM count its linear biases from each document's start; nothing changes for a row that is not packed.

    Counted from the block's start they are the same up to a constant, which softmax ignores. But a constant of hundreds
    takes digits from the scores, in 16 bits most of them.
    """
    decoder = model.base_model
    if not hasattr(type(decoder), "build_alibi_tensor"):
        return

    def build_alibi_tensor(attention_mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        build = functools.partial(type(decoder).build_alibi_tensor, decoder)
        if attention_mask.dim() == 2:  # as in generation
            return build(attention_mask, heads, dtype)
        position = (attention_mask == 0).sum(-1) - 1  # [batch, 1, length]: keys seen before its own
        alibi = build(torch.ones_like(position[:, 0]), heads, dtype)  # [batch × heads, 1, length]
        return alibi.gather(-1, position.repeat_interleave(heads, 0))

    decoder.build_alibi_tensor = build_alibi_tensor


def check_documents(config: PretrainedConfig, max_length: int) -> None:
    """Raise `UserError` unless a model of `config` computes of a block what it computes of each document alone.

    Layers of every kind are tried. A window of attention that is shorter than `max_length` must hold in documents, too.
    """
    model, problem = _empty(config), None
    untried = _classes(model)
    for kind in dict.fromkeys(getattr(config.get_text_config(), "layer_types", None) or [None]):
        tried, found = _try(config, kind, max_length)
        problem, untried = problem or found, untried - tried
    if problem or untried:
        problem = problem or f"layers with {min(cls.__name__ for cls in untried)} come too late to be tried"
        raise UserError(
            f"data.packing=documents: a {type(model).__name__} cannot be trained on several documents in one block "
            f"({problem}): set data.packing=none, or choose another model"
        )


def _empty(config: PretrainedConfig) -> PreTrainedModel:
    model_class = AutoModelForCausalLM._model_mapping[type(config)]  # imported here: on `meta`, torch 2.7 cannot
    with torch.device("meta"):
        return model_class._from_config(config)


def _with_small_windows(config: PretrainedConfig, kind: str | None, max_length: int) -> PretrainedConfig:
    """A copy of `config` with layers of one `kind` only, if they have kinds; windows that matter are small."""
    config = copy.deepcopy(config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in WINDOWS:
            if isinstance(window := getattr(part, name, None), int) and window < max_length:
                setattr(part, name, SMALL_WINDOW)
        if kind and getattr(part, "layer_types", None):
            part.layer_types = [kind] * len(part.layer_types)
    return config


def _try(config: PretrainedConfig, kind: str | None, max_length: int) -> tuple[set[type], str | None]:
    """The classes in a small model with layers of one kind, and what is wrong with its documents, or None."""
    problem = "it cannot be built small"
    try:
        model = _empty(_with_small_windows(config, kind, max_length))
    except Exception:  # layers whose kinds cannot be chosen: a state runs through some of them
        return set(), f"its layers of the kind {kind} cannot be tried alone"
    for small in small_copies(model):
        try:
            alone = _documents_are_alone(small.eval())
            return _classes(small), None if alone else "it lets documents of a block see each other"
        except Exception as error:  # a family that cannot be computed at this size, or takes no such mask
            problem = (str(error) or type(error).__name__).splitlines()[0]
    return set(), problem


def _classes(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


@torch.no_grad()
def _documents_are_alone(small: PreTrainedModel) -> bool:
    restart_alibi(small)
    generator = torch.Generator().manual_seed(0)
    embeddings = {id(part.weight) for part in small.modules() if isinstance(part, nn.Embedding)}
    for parameter in small.parameters():
        if parameter.dim() >= 2 and id(parameter) not in embeddings:  # fresh ones hardly let a token see another
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    ids = torch.randint(1, small.config.get_text_config().vocab_size, (1, sum(TRIED)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in TRIED])[None]
    packed = small(input_ids=ids, use_cache=False, **document_inputs(small, positions)).logits
    joined = small(input_ids=ids, use_cache=False).logits  # each document attends to those before it
    alone = torch.cat([small(input_ids=part, use_cache=False).logits for part in ids.split(TRIED, dim=1)], dim=1)
    return bool((packed - alone).norm() <= 1e-2 * (joined - alone).norm())
