"""Fine-tune a language model with DeepSpeed ZeRO-2 and CPU offload.

The GPU keeps the weights in 16 bits and computes with them. Their fp32 masters, the gradients and Adam's moments, 14 of
16 bytes per parameter, are in host memory, and AdamW runs there: a GPU of 16 GB trains what would need 20 GB and more.

    deepspeed-offload/launch.sh                                        # the real run, on one GPU
    deepspeed-offload/launch.sh --config smoke.yaml                    # no network, no GPU: two processes on the CPU
    deepspeed --num_accelerators 1 deepspeed-offload/train.py          # the same as launch.sh on one GPU, or torchrun
    python deepspeed-offload/train.py --config smoke.yaml train.max_steps=20       # one process; any key can be set

`--help` lists all keys. A run that was stopped or killed resumes when the same command is given again.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

from settings import PROJECT, Config

from common.config import accumulation_steps, check_command_line, parse_config
from common.ds_settings import without_mlflow

if __name__ == "__main__":
    check_command_line(Config, __file__)  # before torch is imported, which takes seconds

with without_mlflow():
    import deepspeed

import torch
import torch.distributed as dist
from cpu_adam_op import build_cpu_adam, replay_steps
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from ds_settings import engine_settings, read_ds_config
from host_buffers import drop_moments, page_lock, share_buffers
from memory_plan import check_memory

from common import data, errors, evaluation, models, runtime
from common.checkpoints import Checkpoints, copy_overlap, identity
from common.ds_settings import restore_scaler, scaler_state
from common.hub import check_can_push
from common.loss import CausalLMLoss
from common.run_folder import RunFolder
from common.schedule import lr_schedule


def setup_distributed(cfg: Config) -> tuple[int, int, torch.device]:
    """Join the process group that the launcher describes in the environment; return rank, world size and device."""
    gpus = torch.cuda.device_count()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compiling processes: host memory is scarce
    runtime.check_process_count()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpus else torch.device("cpu")
    runtime.check_device(cfg, device)
    if gpus:
        torch.cuda.set_device(device)
        runtime.limit_gpu_memory(cfg.runtime, device)
    else:  # gloo does what DeepSpeed would first compile a shared-memory operator for
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # NOTE: the timeout ends all ranks when one has died or hangs; without it the other ranks would wait forever.
    options = {"backend": "nccl" if gpus else "gloo", "timeout": timedelta(minutes=cfg.runtime.timeout_minutes)}
    if "RANK" in os.environ:
        dist.init_process_group(**options)
    else:  # started with plain python: a group of one
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
        dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def build_model(cfg: Config, settings: dict, device: torch.device, dtype: torch.dtype) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine: the model on this rank's device in `dtype`; masters, gradients and moments on the host."""
    model = models.empty_model(cfg.model).to(dtype).to_empty(device=device)  # never whole in host memory
    model.tie_weights()
    model.train()
    models.use_fused_attention(model, device, dtype)
    if cfg.train.activation_checkpointing:
        models.checkpoint_activations(model)
    if cfg.train.compile:
        for layer in models.decoder_layers(model):
            layer.compile()
    groups = models.parameter_groups(model, cfg.train.weight_decay)
    # AdamW works on a group while the new weights of the group before travel.
    groups = models.small_groups(groups, cfg.offload.group_millions * 1e6)
    if cfg.offload.optimizer == "cpu_adam":
        optimizer = DeepSpeedCPUAdam(groups, lr=cfg.train.learning_rate)
    else:
        optimizer = torch.optim.AdamW(groups, lr=cfg.train.learning_rate, fused=True)
    engine, *_ = deepspeed.initialize(model=CausalLMLoss(model), optimizer=optimizer, config=settings)
    # With `pin_memory: true` in ds_config.json, DeepSpeed's own buffers stay as they are, to compare with.
    if not engine.optimizer.cpu_offload_pin_memory:
        share_buffers(engine.optimizer)
        if cfg.offload.page_lock and device.type == "cuda":
            page_lock(engine.optimizer)
    read_weights(cfg, model)
    return engine


@torch.no_grad()
def read_weights(cfg: Config, model) -> None:
    """Fill the empty `model`, and DeepSpeed's masters from the same source: else they would be the 16-bit values."""
    source = models.load_model(cfg.model, cfg.seed, dtype="auto")  # published weights are mapped, not copied
    for name, parameter in model.named_parameters():
        value = source.get_parameter(name)
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value.float())
    for name, buffer in model.named_buffers():  # not in 16 bits: positions would lose their precision
        buffer.data = source.get_buffer(name).to(buffer.device)


def build_dataloaders(cfg: Config, tokenizer, rank: int, world_size: int):
    """This rank's training rows, and its share of the held-out batches."""
    rows, held_out_rows = data.tokenized_rows(cfg.data, cfg.seed, tokenizer, show_progress=rank == 0)
    batches = evaluation.held_out_batches(held_out_rows, cfg.eval.batch_size, tokenizer.pad_token_id, rank, world_size)
    return rows, batches


def train_step(engine, batch: data.StepBatch, device) -> tuple[float, float, int]:
    """One optimizer step over the global batch; returns its loss, its gradient norm before clipping, and its tokens.

    The loss is the sum of all token losses divided by the number of target tokens, both over the whole global batch.
    """
    counts = torch.tensor([batch.targets, batch.tokens], dtype=torch.float64, device=device)
    dist.all_reduce(counts)
    # DeepSpeed averages the gradients over the ranks; the loss is a sum over them.
    scale = dist.get_world_size() / counts[0].float()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in batch.micro_batches:
        micro_batch = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
        loss = engine(**micro_batch)
        # NOTE: scale_wrt_gas would divide by the number of micro-batches too. Gradients leave for the host in buckets
        # while the backward still computes, after each micro-batch: ZeRO-2 has no no_sync.
        engine.backward(loss * scale, scale_wrt_gas=False)
        loss_sum += loss.detach()
        engine.step()  # does nothing before the last micro-batch; then unscale, clip, AdamW, weights back to the GPU
    dist.all_reduce(loss_sum)
    return (loss_sum / counts[0]).item(), float(engine.get_global_grad_norm()), int(counts[1].item())


def evaluate(module, batches, device) -> float:
    """Mean token loss over the held-out rows, the same for any number of ranks; `module` is the unwrapped loss."""
    sums = evaluation.evaluate(module, batches, device)
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def save_checkpoint(checkpoints: Checkpoints, step: int, engine) -> None:
    """Write everything that the next step depends on. Every rank writes its own parts of masters and moments.

    NOTE: not engine.save_checkpoint: to load its files, whole copies of masters and moments go through host memory. A
    file for each tensor is written from where it lies, and read into where it belongs.
    """
    rank, zero = dist.get_rank(), engine.optimizer
    if rank == 0:
        checkpoints.begin(step)
    dist.barrier()
    folder = checkpoints.writing(step)
    runtime.save_rng(folder, rank)
    steps = 0
    for i, masters in enumerate(zero.single_partition_of_fp32_groups):
        state = {"masters": masters.detach(), **zero.optimizer.state[masters]}
        steps = int(state.pop("step", 0))
        for name, tensor in state.items():
            torch.save(tensor, folder / f"{name}-{i}-{rank}.pt")
    if rank == 0:
        saved = {"ranks": dist.get_world_size(), "steps": steps, "scaler": scaler_state(zero.loss_scaler)}
        torch.save(saved, folder / "training.pt")
    dist.barrier()
    if rank == 0:
        checkpoints.commit(step)
    dist.barrier()


@torch.no_grad()
def load_checkpoint(folder: Path, engine) -> None:
    """Put back what `save_checkpoint` wrote; the number of ranks, and so the parts, may have changed."""
    zero, saved = engine.optimizer, torch.load(folder / "training.pt", weights_only=True)
    own_adam, steps = isinstance(zero.optimizer, DeepSpeedCPUAdam), saved["steps"]
    for i, masters in enumerate(zero.single_partition_of_fp32_groups):
        read_part(masters, folder, f"masters-{i}", saved["ranks"])
        if steps:  # else each so far was skipped
            state = zero.optimizer.state[masters]
            state["step"] = steps if own_adam else torch.tensor(float(steps))
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(masters)
                read_part(state[name], folder, f"{name}-{i}", saved["ranks"])
    if own_adam:
        replay_steps(zero.optimizer, steps)
    zero.update_lp_params()  # the weights on the GPU, from their masters
    restore_scaler(zero.loss_scaler, saved["scaler"])
    runtime.load_rng(folder, dist.get_rank())


def read_part(part: torch.Tensor, folder: Path, name: str, ranks: int) -> None:
    """Fill this rank's `part` of a group from what `ranks` ranks wrote: their parts in a row are the whole group."""
    at = 0
    for rank in range(ranks):
        saved = torch.load(folder / f"{name}-{rank}.pt", mmap=True, weights_only=True)
        copy_overlap(part, dist.get_rank() * len(part), saved, at)
        at += len(saved)


def train(cfg: Config) -> None:
    ds_config = read_ds_config(cfg.offload.ds_config, Path(__file__).parent)
    rank, world_size, device = setup_distributed(cfg)
    stop = runtime.StopRequest(cfg.runtime)
    dtype, reason = runtime.resolve_precision(cfg.train.precision, device)
    settings = engine_settings(ds_config, cfg, dtype, accumulation_steps(cfg, world_size))
    if rank == 0:
        check_can_push(cfg)
    runtime.seed_everything(cfg.seed)
    runtime.only_main_shows_progress(rank == 0)
    environment = runtime.describe_environment(world_size, reason)
    with RunFolder(cfg, PROJECT, rank == 0, environment) as run, runtime.explain_out_of_memory(cfg):
        tokenizer = models.load_tokenizer(cfg.model)
        architecture = models.architecture(models.load_model_config(cfg.model, cfg.data))
        environment["memory_plan"] = check_memory(cfg, settings, device, dtype, world_size)
        rows, held_out = build_dataloaders(cfg, tokenizer, rank, world_size)
        run.log_rows(rows.counts)
        if cfg.offload.optimizer == "cpu_adam":
            build_cpu_adam()
        engine = build_model(cfg, settings, device, dtype)
        model, zero = engine.module.model, engine.optimizer

        same_run = identity(cfg, PROJECT, architecture, rows.fingerprint())
        same_run["offload.group_millions"] = cfg.offload.group_millions  # a checkpoint's files are by group
        checkpoints = Checkpoints(run.checkpoints, cfg.checkpoint.keep, same_run)
        found = [checkpoints.find(cfg.checkpoint.resume) if rank == 0 else None]
        dist.broadcast_object_list(found)
        first_step, folder = found[0] or (0, None)
        loader = data.step_loader(rows, cfg, tokenizer.pad_token_id, rank, world_size, first_step)
        total_steps, steps_per_epoch = loader.batch_sampler.total_steps, loader.batch_sampler.steps_per_epoch
        if folder:
            load_checkpoint(folder, engine)
        schedule = lr_schedule(cfg, zero.optimizer, total_steps, first_step)
        run.begin(model, device, dtype, first_step, total_steps, folder)
        if first_step == 0:
            run.log_evaluation(0, evaluate(engine.module, held_out, device))

        skipped, clock = 0, time.perf_counter()
        for step, batch in enumerate(loader, first_step + 1):
            learning_rate = schedule.get_last_lr()[0]
            loss, grad_norm, tokens = train_step(engine, batch, device)
            schedule.step()
            skipped = skipped + 1 if zero.overflow else 0
            runtime.check_finite(step, loss, skipped)
            seconds = time.perf_counter() - clock
            run.log_step(step, step / steps_per_epoch, loss, learning_rate, grad_norm, tokens, seconds)
            stopping = torch.tensor(stop.reason is not None, dtype=torch.int32, device=device)
            dist.all_reduce(stopping, dist.ReduceOp.MAX)  # a signal may have reached one rank only
            if step == total_steps or (cfg.eval.every and step % cfg.eval.every == 0):
                run.log_evaluation(step, evaluate(engine.module, held_out, device))
            if step == total_steps or stopping or (cfg.checkpoint.every and step % cfg.checkpoint.every == 0):
                save_checkpoint(checkpoints, step, engine)
            if stopping and step < total_steps:
                return run.finish("interrupted", stop.reason)
            clock = time.perf_counter()
        drop_moments(zero)  # they are in the checkpoint, and make room for the export
        run.save_model(model, master)
        run.finish("completed")


def master(tensor: torch.Tensor) -> torch.Tensor:
    """The whole fp32 master of a weight, from the parts of all ranks; a buffer as it is."""
    return safe_get_full_fp32_param(tensor) if isinstance(tensor, torch.nn.Parameter) else tensor


def main() -> None:
    train(parse_config(Config, __file__))
    dist.destroy_process_group()


if __name__ == "__main__":
    errors.run(main)
