"""Small copies of a model: the same class and the same configuration but for its size, on the CPU, to try things on.

What a run is to do with a model of billions of parameters is tried on such a copy in a second, before the training:
whether the loss is the model's own (loss.py), and whether what is exported can be read back (export.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import transformers
from packaging.version import Version

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPE_KEY = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
LAYERS, VOCABULARY, INNER = 2, 96, 64
# By what they end with, since families name them differently. The width of the hidden states is not among them: some
# families scale their logits by it.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
INNER_WIDTHS = ("intermediate_size", "ffn_dim", "chunk_size")  # chunks of a state-space layer are padded to that size


def small_copies(model: PreTrainedModel, seed: int = 0) -> Iterator[PreTrainedModel]:
    """Copies of `model` with random weights in fp32, the smallest first, as far as they can be built.

    Not every family can be built with fewer layers or a narrower feed-forward network: take the next one if one fails.
    `model` itself may be on any device, sharded or empty.
    """
    for shrink in (("layers", "inner"), ("layers",), ("inner",), ()):
        config = small_config(model.config, shrink)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            try:
                built = transformers_class(model)._from_config(config, **{DTYPE_KEY: torch.float32})
            except Exception:  # whatever a family raises that needs what was taken away
                continue
            randomize(built)
        yield built


def transformers_class(model: torch.nn.Module) -> type[PreTrainedModel]:
    """The library's class of `model`: FSDP makes one of its own out of it."""
    return next((cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.")), type(model))


def small_config(config: PretrainedConfig, shrink: tuple[str, ...]) -> PretrainedConfig:
    """`config` with a small vocabulary, and with few layers and a narrow inner width if `shrink` names them."""
    config = copy.deepcopy(config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        layers = next((n for name in LAYER_COUNTS if isinstance(n := getattr(part, name, None), int)), 0)
        for name, value in list(vars(part).items()):
            if name.endswith("vocab_size") and isinstance(value, int):
                setattr(part, name, min(value, VOCABULARY))
            elif name.endswith("token_id") and isinstance(value, int | list):
                setattr(part, name, 0)
            elif "layers" in shrink and name in LAYER_COUNTS:
                setattr(part, name, min(value, LAYERS))
            elif "layers" in shrink and isinstance(value, list) and len(value) == layers > LAYERS:  # an entry per layer
                setattr(part, name, value[:LAYERS])
            elif "inner" in shrink and name.endswith(INNER_WIDTHS) and isinstance(value, int):
                setattr(part, name, min(value, INNER))
    return config


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Give every tensor values that matter: fresh biases are zero, and fresh logits so small that no cap shows."""
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not None:
        head.weight.normal_(0, 8 / head.weight.shape[-1] ** 0.5)
