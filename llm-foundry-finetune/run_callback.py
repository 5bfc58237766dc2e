"""What this project adds to Composer's loop: three callbacks, registered with LLM Foundry by train.py.

`GradientNorm` measures and clips, and fixes the sum of gradients on a CPU. `DocumentAttention` masks what Foundry does
not. `RunFolderCallback` writes the run folder, checkpoints and stops cleanly, as the loops of the other projects do by
themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger
from llmfoundry.data.utils import get_finetuning_collator
from prepare_data import Prepared, digest, sampled
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from common import runtime
from common.config import BaseConfig
from common.document_attention import document_inputs, restart_alibi
from common.errors import UserError
from common.run_folder import RunFolder


class GradientNorm(Callback):
    """Measures the gradients' global norm and clips it to `max_norm` (0: does not clip).

    Composer's own `gradient_clipping` looks for modules of the first FSDP and, under FSDP2, clips nothing.
    """

    def __init__(self, max_norm: float):
        self.max_norm = max_norm or math.inf
        self.norm = 0.0  # of the last step, before clipping

    def after_load(self, state: State, logger: Logger) -> None:
        if state.device.name == "cpu" and dist.get_world_size() > 1:
            _average_on_cpu(state.model)

    @torch.no_grad()
    def after_train_batch(self, state: State, logger: Logger) -> None:
        # The loss scaler has been divided out. Every rank has the squares of its shards.
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        shards = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
        squares = torch.stack([torch.linalg.vector_norm(shard, dtype=torch.float64) for shard in shards]).square().sum()
        if isinstance(gradients[0], DTensor):
            dist.all_reduce(squares)
        self.norm = squares.sqrt().item()
        torch._foreach_mul_(shards, min(1.0, self.max_norm / (self.norm + 1e-6)))


def _average_on_cpu(model: torch.nn.Module) -> None:
    """Gloo of torch 2.7 sums when FSDP2 asks for an average: gradients would be too large by the number of ranks."""
    world_size = dist.get_world_size()
    averaged = torch.zeros(1)
    dist.reduce_scatter_tensor(averaged, torch.ones(world_size), dist.ReduceOp.AVG)
    if averaged == world_size:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_all_reduce_hook(lambda gradient: gradient.div_(world_size))


class DocumentAttention(Callback):
    """Keeps attention inside each document of a packed block, by the mask and the positions of the micro-batch.

    Foundry's own packing gives Hugging Face's models neither: they count from the block's start and attend across rows.
    """

    def after_load(self, state: State, logger: Logger) -> None:
        restart_alibi(state.model.model)

    def before_forward(self, state: State, logger: Logger) -> None:
        batch = dict(state.batch)
        with get_precision_context(state.precision, state.precision_config):  # the mask gets its type
            inputs = document_inputs(state.model.model, batch.pop("position_ids", None))
        state.batch = batch | inputs


def collate_documents(dataloader_cfg: dict, tokenizer, dataset_batch_size: int) -> tuple[Callable, int]:
    """Foundry's own collator, with the `position_ids` of rows that are blocks of several documents."""
    collate, size = get_finetuning_collator(dataloader_cfg, tokenizer, dataset_batch_size)

    def with_positions(examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate(examples)
        if any(len(example["turns"]) > 1 for example in examples):
            # 0 at every padded place, each of which is a document by itself, as in the other projects.
            batch["position_ids"] = torch.zeros_like(batch["input_ids"])
            for positions, example in zip(batch["position_ids"], examples, strict=True):
                lengths = [len(turn["input_ids"]) + len(turn["labels"]) for turn in example["turns"]]
                positions[: sum(lengths)] = torch.cat([torch.arange(length) for length in lengths])
        return batch

    return with_positions, size


class RunFolderCallback(Callback):
    """Keeps the run folder while Composer trains. `state` is Composer's, as soon as there is one."""

    def __init__(
        self,
        run: RunFolder,
        cfg: BaseConfig,
        stop: runtime.StopRequest,
        save: Callable[[int, State], None],
        begin: Callable[[torch.nn.Module], None],
        prepared: Prepared,
    ):
        self.run, self.cfg, self.stop, self.save, self.begin = run, cfg, stop, save, begin
        self.prepared, self.total_steps = prepared, prepared.total_steps
        self.state: State | None = None
        self._skipped = 0

    def after_load(self, state: State, logger: Logger) -> None:
        """The model is built and a checkpoint, if there is one, is read."""
        self.state = state
        # A completed run's checkpoint stands at the start of another pass over the file, which was all used. A longer
        # run's file begins with the same rows: it continues after those, in the first pass.
        done = state.timestamp
        state.timestamp = done.copy(
            epoch=0, batch_in_epoch=done.batch, sample_in_epoch=done.sample, token_in_epoch=done.token
        )
        self.begin(state.model.model)

    def fit_start(self, state: State, logger: Logger) -> None:
        found = state.dataloader.dataset
        turns = (found[i]["turns"] for i in sampled(len(found)))
        if len(found) != self.prepared.rows or self.prepared.digest != digest(
            [token for turn in line for part in ("input_ids", "labels") for token in turn[part]] for line in turns
        ):
            raise UserError(
                f"LLM Foundry has {len(found):,} rows, which are not the {self.prepared.rows:,} of "
                f"{self.prepared.train_file}: its batches would not be those of the other projects"
            )
        for group in state.optimizers[0].param_groups:  # a checkpoint's may be those of another learning rate
            group["weight_decay"] *= self.cfg.train.learning_rate / (group["initial_lr"] or 1)
            group["initial_lr"] = self.cfg.train.learning_rate
        self._clock = time.perf_counter()

    def batch_start(self, state: State, logger: Logger) -> None:
        # Composer steps its schedule before it counts the batch: each step would have the rate of the one before, and a
        # step after a resume that of the checkpoint. The schedule is a function of the step alone: ask it again.
        (factor, *_), groups = state.schedulers[0].lr_lambdas, state.optimizers[0].param_groups
        self._learning_rate = self.cfg.train.learning_rate * factor(0)  # looks at the step itself, not at its argument
        for group in groups:
            group["lr"] = self._learning_rate
        self._loss_scale = state.scaler.get_scale()

    def batch_end(self, state: State, logger: Logger) -> None:
        step, loss = state.timestamp.batch.value, state.total_loss_dict["loss/train/total"]
        self._skipped = self._skipped + 1 if state.scaler.get_scale() < self._loss_scale else 0
        runtime.check_finite(step, loss, self._skipped)
        self.run.log_step(
            step,
            epoch=step / self.prepared.steps_per_epoch,
            loss=loss,
            learning_rate=self._learning_rate,
            grad_norm=next(c.norm for c in state.callbacks if isinstance(c, GradientNorm)),
            tokens=(state.timestamp.token - state.previous_timestamp.token).value,
            seconds=time.perf_counter() - self._clock,
        )

    def eval_end(self, state: State, logger: Logger) -> None:
        (metrics,) = state.eval_metrics.values()
        loss = metrics["LanguageCrossEntropy"].compute().item()  # a collective
        self.run.log_evaluation(state.timestamp.batch.value, loss)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        stopping = torch.tensor(self.stop.reason is not None, dtype=torch.int32)
        stopping = state.device.tensor_to_device(stopping)
        dist.all_reduce(stopping, dist.ReduceOp.MAX)  # a signal may have reached one rank only
        every = self.cfg.checkpoint.every
        if step < self.total_steps:  # after the last one the run is complete: see train.py
            if stopping or (every and step % every == 0):
                self.save(step, state)
            if stopping:
                state.evaluators = []  # Composer would evaluate once more at its end
                state.stop_training()
        self._clock = time.perf_counter()
