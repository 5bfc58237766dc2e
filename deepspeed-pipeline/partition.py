"""How many decoder layers each stage gets.

All stages wait for the slowest. The last one has the output head too, which takes the time of several layers. Of how
many depends on the GPU and the micro-batch, and not on the operations alone: so `measured` times both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from stages import DecoderLayer, Embedding, Positions, checkpoint_activations
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import PretrainedConfig

from common import models
from common.config import BaseConfig
from common.errors import UserError
from common.loss import token_losses

SECONDS, BLOCKS = 0.1, 3  # that a measurement takes, about


class Costs(NamedTuple):
    """What forward and backward of one micro-batch cost: seconds if they were measured, or operations a token."""

    embedding: float
    layer: float
    head: float  # with the loss


def layers_by_stage(
    config: PretrainedConfig, partition: str, stages: int, costs: Callable[[], Costs]
) -> tuple[list[int], Costs | None]:
    """Decoder layers of each stage for `pipeline.partition`, and the costs they were chosen by, if they were.

    Raises `UserError`.
    """
    layers = config.num_hidden_layers
    if stages > layers:
        raise UserError(
            f"pipeline.stages={stages}: the model has {layers} decoder layers, and each stage needs one: set it to "
            f"{layers} or less"
        )
    if partition in ("measured", "computed"):
        found = costs() if stages > 1 else None
        return (deal_out(layers, stages, found) if found else [layers]), found
    given = [int(part) if part.strip().isdecimal() else 0 for part in partition.split(",")]
    if len(given) != stages or sum(given) != layers or 0 in given:
        raise UserError(
            f"pipeline.partition={partition}: must be measured, computed, or {stages} whole numbers with commas "
            f"between, one for each stage, that add up to the model's {layers} decoder layers"
        )
    return given, None


def describe(partition: list[int], costs: Costs | None, kind: str) -> str:
    """A line about the stages for the user; `kind` is `pipeline.partition`."""
    line = f"Decoder layers by stage: {', '.join(map(str, partition))}"
    if costs is None:
        return line
    line += f" (as {kind}: output head and loss cost {costs.head / costs.layer:.1f} layers"
    return line + (f", a layer takes {1e3 * costs.layer:.1f} ms per micro-batch)" if kind == "measured" else ")")


def deal_out(layers: int, stages: int, costs: Costs) -> list[int]:
    """The partition whose slowest stage is as fast as can be. Each stage has one layer at least."""
    counts, spent = [1] * stages, [costs.layer] * stages
    spent[0] += costs.embedding
    spent[-1] += costs.head
    for _ in range(layers - stages):
        # Of equal ones not the first: it holds the embedding, and the most micro-batches at a time.
        stage = min(range(stages), key=lambda stage: (spent[stage], -stage))
        counts[stage] += 1
        spent[stage] += costs.layer
    return counts


def costs(cfg: BaseConfig, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> Costs:
    """What `pipeline.partition` asks for. Collective, for all ranks."""
    if cfg.pipeline.partition == "computed":
        return computed_costs(config, cfg.data.max_length, cfg.train.activation_checkpointing)
    found = measured_costs(cfg, device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the training's tensors have other sizes
    return found


def computed_costs(config: PretrainedConfig, length: int, checkpointing: bool) -> Costs:
    """Floating-point operations a token, forward and backward. An embedding only looks rows up."""
    width, heads = config.hidden_size, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", heads)
    head_width = getattr(config, "head_dim", None) or width // heads
    attention = 2 * width * head_width * (heads + groups)
    weights = attention + 3 * width * config.intermediate_size
    products = weights + length * head_width * heads  # of queries with half of the keys, and of the values
    return Costs(0.0, 2.0 * products * (4 if checkpointing else 3), 6.0 * config.vocab_size * width)


def measured_costs(cfg: BaseConfig, device: torch.device, dtype: torch.dtype) -> Costs:
    """Seconds of forward and backward of a micro-batch on `device`; of the slowest rank, and the same on all.

    It takes memory for a layer and three embeddings, and gives it back.
    """
    model = models.empty_model(cfg.model).to(dtype)
    models.use_fused_attention(model, device, dtype)
    embedding = Embedding(model.get_input_embeddings(), device)
    layer = DecoderLayer(models.decoder_layers(model)[0], Positions(model, device), device)
    generator = torch.Generator(device).manual_seed(0)  # of its own: the training's is left as it was
    with torch.no_grad():
        for parameter in (*embedding.parameters(), *layer.parameters()):
            parameter.normal_(std=0.02, generator=generator)
    if cfg.train.compile:
        layer.layer.compile()

    shape = (cfg.train.micro_batch_size, cfg.data.max_length)
    ids = torch.randint(model.config.vocab_size, shape, device=device, generator=generator)
    hidden = torch.randn((*shape, model.config.hidden_size), device=device, dtype=dtype, generator=generator)
    hidden.requires_grad_()
    through_layer = checkpoint_activations if cfg.train.activation_checkpointing else (lambda layer, x: layer(x))
    costs = torch.tensor(
        [
            _seconds(lambda: embedding(ids)),
            _seconds(lambda: through_layer(layer, hidden)),
            # The head has the embedding's shape, tied or not.
            _seconds(lambda: token_losses(hidden, embedding.embedding.weight, ids)),
        ],
        dtype=torch.float64,
        device=device,
    )
    dist.all_reduce(costs, dist.ReduceOp.MAX)
    return Costs(*costs.tolist())


def _seconds(forward: Callable[[], Tensor]) -> float:
    """Time of a forward and its backward, many in a row, as the CPU runs ahead of a GPU; of the best of some blocks."""

    def both() -> None:
        output = forward()
        output.backward(torch.ones_like(output))

    timer = Timer("both()", globals={"both": both}, num_threads=torch.get_num_threads())
    once = timer.timeit(1).mean  # after two to warm up: the first compiles kernels
    number = max(1, min(30, round(SECONDS / once)))
    return min(timer.timeit(number).mean for _ in range(BLOCKS))
