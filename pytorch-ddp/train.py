"""Fine-tune a language model with PyTorch DistributedDataParallel (DDP).

Every GPU holds the whole model and works on its own part of each global batch. While a GPU still computes the backward
pass, DDP already averages the finished gradients with those of the other GPUs, so all of them take the same step.

    pytorch-ddp/launch.sh                                        # the real run: one process per GPU found
    pytorch-ddp/launch.sh --config smoke.yaml                    # no network, no GPU: two processes on the CPU
    torchrun --nproc_per_node 2 pytorch-ddp/train.py             # the same as launch.sh on two GPUs
    python pytorch-ddp/train.py --config smoke.yaml train.max_steps=20       # one process; any key can be set

`--help` lists all keys. A run that was stopped or killed resumes when the same command is given again.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from datetime import timedelta
from pathlib import Path

from settings import PROJECT, Config

from common.config import accumulation_steps, check_command_line, parse_config

if __name__ == "__main__":
    check_command_line(Config, __file__)  # before torch is imported, which takes seconds

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from common import data, errors, evaluation, models, runtime
from common.checkpoints import Checkpoints, identity
from common.errors import UserError
from common.hub import check_can_push
from common.loss import CausalLMLoss
from common.run_folder import RunFolder
from common.schedule import lr_schedule


def setup_distributed(cfg: Config) -> tuple[int, int, torch.device]:
    """Join the process group that the launcher describes in the environment; return rank, world size and device."""
    gpus = torch.cuda.device_count()
    runtime.check_process_count()
    if not gpus and cfg.ddp.gradient_compression == "bf16":
        raise UserError("ddp.gradient_compression=bf16 needs NCCL, that is GPUs: on a CPU set it to fp16 or none")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpus else torch.device("cpu")
    runtime.check_device(cfg, device)
    if gpus:
        torch.cuda.set_device(device)
        runtime.limit_gpu_memory(cfg.runtime, device)
    # NOTE: the timeout ends all ranks when one has died or hangs; without it the other ranks would wait forever.
    options = {"backend": "nccl" if gpus else "gloo", "timeout": timedelta(minutes=cfg.runtime.timeout_minutes)}
    if "RANK" in os.environ:
        dist.init_process_group(**options)
    else:  # started with plain python: a group of one
        dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def build_model(cfg: Config, device: torch.device, dtype: torch.dtype) -> DistributedDataParallel:
    """The model on this rank's device, its weights fp32 masters, wrapped so that backward averages the gradients."""
    model = models.load_model(cfg.model, cfg.seed).to(device)
    model.train()
    models.use_fused_attention(model, device, dtype)
    if cfg.train.activation_checkpointing:
        models.checkpoint_activations(model)
    if cfg.train.compile:
        # NOTE: layer by layer and inside DDP. Compiled as one piece, the backward would hand over all gradients at its
        # end, and nothing would be left to overlap their all-reduce with. torch would also cut each layer where a
        # bucket ends, which only a model compiled in one piece needs.
        torch._dynamo.config.optimize_ddp = False
        for layer in models.decoder_layers(model):
            layer.compile()
    ddp = DistributedDataParallel(
        CausalLMLoss(model, autocast=dtype),
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # no second copy of the gradients
        bucket_cap_mb=cfg.ddp.bucket_mb,
    )
    if cfg.ddp.gradient_compression != "none":
        ddp.register_comm_hook(None, getattr(default_hooks, f"{cfg.ddp.gradient_compression}_compress_hook"))
    return ddp


def build_dataloaders(cfg: Config, tokenizer, rank: int, world_size: int):
    """This rank's training rows, and its share of the held-out batches."""
    rows, held_out_rows = data.tokenized_rows(cfg.data, cfg.seed, tokenizer, show_progress=rank == 0)
    batches = evaluation.held_out_batches(held_out_rows, cfg.eval.batch_size, tokenizer.pad_token_id, rank, world_size)
    return rows, batches


def train_step(model, batch: data.StepBatch, optimizer, scaler, cfg: Config, device) -> tuple[float, float, int]:
    """One optimizer step over the global batch; returns its loss, its gradient norm before clipping, and its tokens.

    The loss is the sum of all token losses divided by the number of target tokens, both over the whole global batch.
    """
    counts = torch.tensor([batch.targets, batch.tokens], dtype=torch.float64, device=device)
    dist.all_reduce(counts)
    # DDP averages the gradients over the ranks; the loss is a sum over them.
    scale = dist.get_world_size() / counts[0].float()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for i, micro_batch in enumerate(batch.micro_batches):
        is_last = i == len(batch.micro_batches) - 1
        # NOTE: no_sync must cover the forward and the backward. Gradients travel once per step, with the last one.
        with contextlib.nullcontext() if is_last else model.no_sync():
            micro_batch = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
            loss = model(**micro_batch)
            scaler.scale(loss * scale).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.max_grad_norm or math.inf)
    scaler.step(optimizer)  # does nothing if a gradient is not finite; gradients are equal, so all ranks agree
    scaler.update()
    optimizer.zero_grad(set_to_none=False)  # kept: they are views of DDP's buckets
    dist.all_reduce(loss_sum)
    return (loss_sum / counts[0]).item(), norm.item(), int(counts[1].item())


def evaluate(module, batches, device) -> float:
    """Mean token loss over the held-out rows, the same for any number of ranks; `module` is the unwrapped loss."""
    sums = evaluation.evaluate(module, batches, device)
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def save_checkpoint(checkpoints: Checkpoints, step: int, model, optimizer, scaler) -> None:
    """Write everything that the next step depends on. All ranks hold the same model; only the RNG differs."""
    rank = dist.get_rank()
    if rank == 0:
        checkpoints.begin(step)
    dist.barrier()
    folder = checkpoints.writing(step)
    runtime.save_rng(folder, rank)
    if rank == 0:
        parts = {"model": model.module, "optimizer": optimizer, "scaler": scaler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "training.pt")
    dist.barrier()
    if rank == 0:
        checkpoints.commit(step)
    dist.barrier()


def load_checkpoint(folder: Path, model, optimizer, scaler) -> None:
    """Put back what `save_checkpoint` wrote; the number of ranks may have changed."""
    state = torch.load(folder / "training.pt", map_location="cpu", mmap=True, weights_only=True)
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty unless the run was in fp16 so far
        scaler.load_state_dict(state["scaler"])
    runtime.load_rng(folder, dist.get_rank())


def train(cfg: Config) -> None:
    rank, world_size, device = setup_distributed(cfg)
    stop = runtime.StopRequest(cfg.runtime)
    dtype, reason = runtime.resolve_precision(cfg.train.precision, device)
    accumulation_steps(cfg, world_size)  # refuses a global batch that cannot be split
    if rank == 0:
        check_can_push(cfg)
    runtime.seed_everything(cfg.seed)
    runtime.only_main_shows_progress(rank == 0)
    environment = runtime.describe_environment(world_size, reason)
    with RunFolder(cfg, PROJECT, rank == 0, environment) as run, runtime.explain_out_of_memory(cfg):
        tokenizer = models.load_tokenizer(cfg.model)
        architecture = models.architecture(models.load_model_config(cfg.model, cfg.data))
        rows, held_out = build_dataloaders(cfg, tokenizer, rank, world_size)
        run.log_rows(rows.counts)
        model = build_model(cfg, device, dtype)
        groups = models.parameter_groups(model, cfg.train.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=cfg.train.learning_rate, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        same_run = identity(cfg, PROJECT, architecture, rows.fingerprint())
        checkpoints = Checkpoints(run.checkpoints, cfg.checkpoint.keep, same_run)
        found = [checkpoints.find(cfg.checkpoint.resume) if rank == 0 else None]
        dist.broadcast_object_list(found)
        first_step, folder = found[0] or (0, None)
        loader = data.step_loader(rows, cfg, tokenizer.pad_token_id, rank, world_size, first_step)
        total_steps, steps_per_epoch = loader.batch_sampler.total_steps, loader.batch_sampler.steps_per_epoch
        if folder:
            load_checkpoint(folder, model, optimizer, scaler)
        schedule = lr_schedule(cfg, optimizer, total_steps, first_step)
        run.begin(model.module.model, device, dtype, first_step, total_steps, folder)
        if first_step == 0:
            run.log_evaluation(0, evaluate(model.module, held_out, device))

        skipped, clock = 0, time.perf_counter()
        for step, batch in enumerate(loader, first_step + 1):
            learning_rate, loss_scale = schedule.get_last_lr()[0], scaler.get_scale()
            loss, grad_norm, tokens = train_step(model, batch, optimizer, scaler, cfg, device)
            schedule.step()
            skipped = skipped + 1 if scaler.get_scale() < loss_scale else 0
            runtime.check_finite(step, loss, skipped)
            seconds = time.perf_counter() - clock
            run.log_step(step, step / steps_per_epoch, loss, learning_rate, grad_norm, tokens, seconds)
            stopping = torch.tensor(stop.reason is not None, dtype=torch.int32, device=device)
            dist.all_reduce(stopping, dist.ReduceOp.MAX)  # a signal may have reached one rank only
            if step == total_steps or (cfg.eval.every and step % cfg.eval.every == 0):
                run.log_evaluation(step, evaluate(model.module, held_out, device))
            if step == total_steps or stopping or (cfg.checkpoint.every and step % cfg.checkpoint.every == 0):
                save_checkpoint(checkpoints, step, model, optimizer, scaler)
            if stopping and step < total_steps:
                return run.finish("interrupted", stop.reason)
            clock = time.perf_counter()
        run.save_model(model.module.model)
        run.finish("completed")


def main() -> None:
    train(parse_config(Config, __file__))
    dist.destroy_process_group()


if __name__ == "__main__":
    errors.run(main)
