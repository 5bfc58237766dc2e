"""A Hugging Face decoder cut into the stages of a pipeline.

    ids → embedding → layer 0 … layer k │ layer k+1 … last layer → norm → output head → loss
          stage 0                       │ stage 1            (labels come in here)

All modules are the library's own, taken from a model without weights. A process gives memory to those of its stage;
the rest stay on the `meta` device, so that names and shapes of the whole model are known everywhere. One tensor travels
from stage to stage, the hidden states [batch, length, width]: positions are counted again in each stage, and no mask is
needed, since padding is on the right, where causal attention never looks. With blocks of several documents, the
positions [batch, length] travel as well, 8 bytes a token, and each stage makes its mask of them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.config import BaseConfig
from common.document_attention import document_mask
from common.errors import UserError
from common.loss import check_loss, chunked_losses, token_losses

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What layers pass on: hidden states (the first gets token ids), and with packed documents the positions in each.
StageInput = Tensor | tuple[Tensor, Tensor]
FAMILIES = ("llama", "qwen2")  # what `DecoderLayer` calls and `decoder_specs` takes apart is theirs


class Embedding(nn.Module):
    """Token ids to hidden states: the first layer."""

    def __init__(self, embedding: nn.Embedding, device: torch.device):
        super().__init__()
        self.embedding = embedding.to_empty(device=device)

    def forward(self, inputs: StageInput) -> StageInput:
        input_ids, position_ids = _unpacked(inputs)
        hidden = self.embedding(input_ids)
        return hidden if position_ids is None else (hidden, position_ids)


class DecoderLayer(nn.Module):
    """One of the library's decoder layers, from hidden states to hidden states."""

    def __init__(self, layer: nn.Module, positions: Positions, device: torch.device):
        super().__init__()
        self.layer = layer.to_empty(device=device)
        self.positions = positions

    def forward(self, inputs: StageInput) -> StageInput:
        hidden, documents = _unpacked(inputs)
        position_ids, cos_and_sin, mask = self.positions(hidden, documents)
        output = self.layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=cos_and_sin)
        hidden = output if torch.is_tensor(output) else output[0]  # transformers before 4.54 returns a tuple
        return hidden if documents is None else (hidden, documents)


class Norm(nn.Module):
    """The norm after the last decoder layer."""

    def __init__(self, norm: nn.Module, device: torch.device):
        super().__init__()
        self.norm = norm.to_empty(device=device)

    def forward(self, inputs: StageInput) -> Tensor:
        hidden, _ = _unpacked(inputs)
        return self.norm(hidden)


class Head(nn.Module):
    """An output head with weights of its own. It passes on: logits exist in chunks only, inside of the loss."""

    def __init__(self, head: nn.Linear, device: torch.device):
        super().__init__()
        self.head = head.to_empty(device=device)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class Positions:
    """The rotary embedding of positions 0, 1, 2 …, and the mask of documents, which all layers of a stage share.

    No `nn.Module`: DeepSpeed turns a module's buffers into 16 bits, and far positions would lose their precision.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device):
        # Built again: its frequencies are computed, not loaded, and those of a model on `meta` have no values.
        self._rotary = type(model.base_model.rotary_emb)(config=model.config).to(device)
        self._computed_for: tuple | None = None

    def __call__(
        self, hidden: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Position ids [1, length], cosine and sine for them, and no mask.

        For `documents`, the position of each token in its own [batch, length], these and their mask.
        """
        # All layers are given one tensor of a micro-batch. It is kept until the next, so no other can have its id.
        wanted = hidden.shape[1], hidden.dtype, id(documents)
        if self._computed_for != wanted:
            position_ids, mask = torch.arange(hidden.shape[1], device=hidden.device)[None], None
            if documents is not None:
                position_ids, mask = documents, document_mask(documents, hidden.dtype)
            self._computed = position_ids, self._rotary(hidden, position_ids), mask
            self._computed_for = wanted
        return self._computed


class DecoderPipeline(PipelineModule):
    """This process's stage of `model`, which is on `meta` before and there after for the other stages only.

    The stages get `layers_by_stage` decoder layers, the first the embedding as well, the last the norm and the head.
    """

    def __init__(self, model: PreTrainedModel, layers_by_stage: list[int], device: torch.device, **options: Any):
        bounds = [0]
        for layers in layers_by_stage:
            bounds.append(bounds[-1] + layers)
        specs = decoder_specs(model, device)
        # The embedding goes with the first layers; what follows the last layer goes with it.
        bounds = [0, *(bound + 1 for bound in bounds[1:-1]), len(specs)]
        # DeepSpeed prints the topology, the seeds and every layer, and broadcasts tied weights as if to backpropagate.
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            super().__init__(
                specs, num_stages=len(layers_by_stage), loss_fn=self.loss, partition_method=bounds, **options
            )
        model.tie_weights()  # if the embedding has got memory, it is another tensor than the head's
        self.head = [model.get_output_embeddings().weight]  # in a list: it is the parameter of a layer already

    def _partition_layers(self, method: list[int]) -> None:
        # NOTE: DeepSpeed's own methods count layers or parameters. Neither sees that a head costs the compute of
        # several layers, and an embedding none.
        self.parts = method
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=method[stage], stop=method[stage + 1])

    def loss(self, hidden: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        """Sum of the token losses × a factor, for `targets` (labels, factor); in evaluation, `token_statistics`."""
        labels, factor = targets
        sums = token_losses(hidden, self.head[0], labels, statistics=not self.training)
        return sums * factor if self.training else sums


def decoder_specs(model: PreTrainedModel, device: torch.device) -> list[LayerSpec]:
    """The layers of `model` in order. None has memory before DeepSpeed builds those of its stage."""
    decoder, positions = model.base_model, Positions(model, device)
    layers = [LayerSpec(DecoderLayer, layer, positions, device) for layer in decoder.layers]
    norm = LayerSpec(Norm, decoder.norm, device)
    if not model.config.tie_word_embeddings:
        first = LayerSpec(Embedding, decoder.embed_tokens, device)
        return [first, *layers, norm, LayerSpec(Head, model.get_output_embeddings(), device)]
    # NOTE: one key, so that DeepSpeed starts both copies alike and adds their gradients up: they stay equal forever.
    tied = functools.partial(
        TiedLayerSpec, "embedding", Embedding, decoder.embed_tokens, device, tied_weight_attr="embedding.weight"
    )
    return [tied(), *layers, norm, tied(forward_fn=_pass_on)]


def _pass_on(embedding: Embedding, hidden: Tensor) -> Tensor:
    return hidden  # as `Head` does


def _unpacked(inputs: StageInput) -> tuple[Tensor, Tensor | None]:
    return (inputs, None) if torch.is_tensor(inputs) else inputs


checkpoint_activations = functools.partial(checkpoint, use_reentrant=False)


def check_family(config: PretrainedConfig, name: str) -> None:
    """Raise `UserError` for a model that `decoder_specs` cannot take apart."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model.name={name}: a {config.model_type} model cannot be cut into stages here; choose a model of the "
            f"families {', '.join(FAMILIES)}, or another project"
        )
    if getattr(config, "use_sliding_window", False):
        raise UserError(f"model.name={name}: its attention has a sliding window, which needs a mask that stages lack")


def check_head(model: PreTrainedModel) -> None:
    """Raise `UserError` unless the loss from the last hidden states and the output matrix is the model's own."""
    if check_loss(model) is not chunked_losses:
        raise UserError(
            f"model.name: {type(model).__name__} changes its logits after the output matrix, which the last stage does "
            f"not compute; choose another model, or another project"
        )


def stage_count(stages: int, world_size: int) -> int:
    """How many stages a pipeline has, for `pipeline.stages` and the number of processes. Raises `UserError`."""
    stages = stages or world_size
    if world_size % stages:
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise UserError(
            f"pipeline.stages={stages}: {world_size} processes are not a multiple of {stages} stages: "
            f"set it to {' or '.join(map(str, fitting))}, or start another number of processes"
        )
    return stages


def warn_of_waiting(cfg: BaseConfig, stages: int, pipelines: int, micro_batches: int) -> None:
    """Warn about a batch that is too small for the stages: with fewer micro-batches, they never compute all at once."""
    if micro_batches >= stages:
        return
    rows = cfg.train.global_batch_size // pipelines
    fitting = [n for n in range(1, rows // stages + 1) if rows % n == 0]
    smaller = f"train.micro_batch_size={fitting[-1]}, or " if fitting else ""
    print(
        f"warning: too few micro-batches for {stages} stages, {micro_batches}: a stage computes for "
        f"{micro_batches / (micro_batches + stages - 1):.0%} of the time at most. Set {smaller}"
        f"train.global_batch_size={cfg.train.micro_batch_size * stages * pipelines} or more",
        file=sys.stderr,
    )
