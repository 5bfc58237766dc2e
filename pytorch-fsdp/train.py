"""Fine-tune a language model with PyTorch FSDP (`fully_shard`).

Every GPU keeps one part of each weight, gradient and Adam moment. A layer's weights are gathered from all GPUs just
before the layer computes and dropped right after; its gradients are summed and divided up as soon as they are there.

    pytorch-fsdp/launch.sh                                        # the real run: one process per GPU found
    pytorch-fsdp/launch.sh --config smoke.yaml                    # no network, no GPU: two processes on the CPU
    torchrun --nproc_per_node 2 pytorch-fsdp/train.py             # the same as launch.sh on two GPUs
    python pytorch-fsdp/train.py --config smoke.yaml train.max_steps=20       # one process; any key can be set

`--help` lists all keys. A run that was stopped or killed resumes when the same command is given again.
"""

from __future__ import annotations

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
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from workarounds import check_gloo_averages, ignore_view_warning, wait_for_gloo

from common import data, errors, evaluation, models, runtime
from common.checkpoints import Checkpoints, identity
from common.hub import check_can_push
from common.loss import CausalLMLoss
from common.run_folder import RunFolder
from common.schedule import lr_schedule


def setup_distributed(cfg: Config) -> tuple[int, int, torch.device]:
    """Join the process group that the launcher describes in the environment; return rank, world size and device."""
    gpus = torch.cuda.device_count()
    runtime.check_process_count()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpus else torch.device("cpu")
    runtime.check_device(cfg, device)
    if gpus:
        torch.cuda.set_device(device)
        runtime.limit_gpu_memory(cfg.runtime, device)
    # NOTE: the timeout ends all ranks when one has died or hangs; without it the other ranks would wait forever.
    # Gloo as well: with cpu_offload, gradients are in host memory when the scaler looks for infinities in them.
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    options = {"backend": backend, "timeout": timedelta(minutes=cfg.runtime.timeout_minutes)}
    if "RANK" in os.environ:
        dist.init_process_group(**options)
    else:  # started with plain python: a group of one
        dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
    if not gpus:
        check_gloo_averages()
    return dist.get_rank(), dist.get_world_size(), device


def build_model(cfg: Config, device: torch.device, dtype: torch.dtype) -> FSDPModule:
    """The model with its fp32 master weights sharded over the ranks: each holds some rows of every tensor."""
    model = models.empty_model(cfg.model)  # modules without weights: no rank ever holds the whole model
    model.train()
    models.use_fused_attention(model, device, dtype)
    if cfg.train.activation_checkpointing:
        models.checkpoint_activations(model)
    layers = models.decoder_layers(model)
    ignore_view_warning()
    if cfg.train.compile:
        # NOTE: the forward only. The hooks that gather and drop a layer's weights stay outside of what is compiled.
        for layer in layers:
            layer.forward = torch.compile(layer.forward)
    options = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        # Weights are gathered, and computed with, in `dtype`; gradients are summed over the ranks in fp32.
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(device.type == "cuda") if cfg.fsdp.cpu_offload else OffloadPolicy(),
    }
    # NOTE: one group for each decoder layer, and one at the root for what is left: embeddings, last norm, output head.
    # A group is gathered, and its gradients are reduced, in one piece; so the most that is whole at a time is a few.
    for layer in layers:
        fully_shard(layer, reshard_after_forward=cfg.fsdp.reshard_after_forward, **options)
    fsdp = fully_shard(CausalLMLoss(model), **options)
    for i, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(list(layers[i + 1 : i + 1 + cfg.fsdp.prefetch]))
        layer.set_modules_to_backward_prefetch(list(layers[max(0, i - cfg.fsdp.prefetch) : i])[::-1])
    read_weights(cfg, model, device)
    return fsdp


@torch.no_grad()
def read_weights(cfg: Config, model, device: torch.device) -> None:
    """Fill the sharded, still empty `model`. Only rank 0 reads the weights; it distributes them tensor by tensor."""
    is_main = dist.get_rank() == 0
    source = models.load_model(cfg.model, cfg.seed, dtype="auto") if is_main else model
    model.to_empty(device="cpu" if cfg.fsdp.cpu_offload else device)
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, device=device)
        if is_main:
            whole.copy_(source.get_parameter(name))
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
    for name, buffer in model.named_buffers():
        buffer.data = source.get_buffer(name).to(device) if is_main else torch.empty_like(buffer, device=device)
        dist.broadcast(buffer, 0)


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
    # FSDP averages the gradients over the ranks; the loss is a sum over them.
    scale = dist.get_world_size() / counts[0].float()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for i, micro_batch in enumerate(batch.micro_batches):
        is_last = i == len(batch.micro_batches) - 1
        # NOTE: with no_sync, gradients wait for the last micro-batch whole, in fp32, on every rank. Without it they are
        # reduced after each, and every rank adds up its own shards only.
        model.set_requires_gradient_sync(is_last or not cfg.fsdp.no_sync)
        micro_batch = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
        loss = model(**micro_batch)
        scaler.scale(loss * scale).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)  # a gradient that is not finite lies in one rank's shard: this informs all ranks
    # Every rank has the squares of its shards. In fp64: on a CPU (cpu_offload), PyTorch's fp32 norm of a tensor of this
    # size is off by percents.
    shards = [parameter.grad.to_local() for parameter in model.parameters()]
    squares = torch.stack([torch.linalg.vector_norm(shard, dtype=torch.float64) for shard in shards]).square().sum()
    dist.all_reduce(squares := squares.to(device))
    norm = squares.sqrt()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.train.max_grad_norm or math.inf, norm)
    scaler.step(optimizer)  # does nothing if a gradient is not finite
    scaler.update()
    optimizer.zero_grad()
    dist.all_reduce(loss_sum)
    return (loss_sum / counts[0]).item(), norm.item(), int(counts[1].item())


def evaluate(module, batches, device) -> float:
    """Mean token loss over the held-out rows, the same for any number of ranks; `module` is the unwrapped loss."""
    sums = evaluation.evaluate(module, batches, device)
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def save_checkpoint(checkpoints: Checkpoints, step: int, model, optimizer, scaler) -> None:
    """Write everything that the next step depends on. Every rank writes its own shards."""
    rank = dist.get_rank()
    if rank == 0:
        checkpoints.begin(step)
    dist.barrier()
    folder = checkpoints.writing(step)
    runtime.save_rng(folder, rank)
    if rank == 0:
        torch.save(scaler.state_dict(), folder / "scaler.pt")
    weights, moments = get_state_dict(model, optimizer)
    # NOTE: a file for each tensor, and none copied ahead. The writer keeps what goes into a file in host memory until
    # the file is complete: with one file per rank, all of its GPU's shards.
    options = {"single_file_per_rank": False, "per_thread_copy_ahead": 0, "sync_files": False}  # commit() syncs
    writer = dcp.FileSystemWriter(folder / "shards", **options)
    dcp.save({"model": weights, "optimizer": moments}, storage_writer=writer)
    dist.barrier()
    if rank == 0:
        checkpoints.commit(step)
    dist.barrier()


def load_checkpoint(folder: Path, model, optimizer, scaler) -> None:
    """Put back what `save_checkpoint` wrote; the number of ranks, and so the shards, may have changed."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "shards")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    if state := torch.load(folder / "scaler.pt", weights_only=True):  # empty unless the run was in fp16 so far
        scaler.load_state_dict(state)
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
        run.begin(model.model, device, dtype, first_step, total_steps, folder)
        if first_step == 0:
            run.log_evaluation(0, evaluate(model, held_out, device))

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
                run.log_evaluation(step, evaluate(model, held_out, device))
            if step == total_steps or stopping or (cfg.checkpoint.every and step % cfg.checkpoint.every == 0):
                save_checkpoint(checkpoints, step, model, optimizer, scaler)
            if stopping and step < total_steps:
                return run.finish("interrupted", stop.reason)
            clock = time.perf_counter()
        run.save_model(model.model, DTensor.full_tensor)
        run.finish("completed")


def main() -> None:
    train(parse_config(Config, __file__))
    wait_for_gloo()
    dist.destroy_process_group()


if __name__ == "__main__":
    errors.run(main)
