"""Fine-tune a language model with a DeepSpeed pipeline and ZeRO-1.

Each GPU holds some of the layers, a stage. A batch is cut into micro-batches that go through the stages one after
another, so that all GPUs compute at the same time, each on another micro-batch. What travels is one tensor of hidden
states per micro-batch and its gradient on the way back: little, which suits slow links between GPUs.

    deepspeed-pipeline/launch.sh                                        # the real run: one stage on each GPU found
    deepspeed-pipeline/launch.sh --config smoke.yaml                    # no network, no GPU: two stages on the CPU
    torchrun --nproc_per_node 4 deepspeed-pipeline/train.py pipeline.stages=2      # two pipelines of two stages
    python deepspeed-pipeline/train.py --config smoke.yaml train.max_steps=20      # one stage; any key can be set

`--help` lists all keys. A run that was stopped or killed resumes when the same command is given again.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from settings import PROJECT, Config

from common.config import accumulation_steps, check_command_line, parse_config
from common.ds_settings import without_mlflow

if __name__ == "__main__":
    check_command_line(Config, __file__)  # before torch is imported, which takes seconds

with without_mlflow():
    import deepspeed

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from ds_settings import read_ds_config
from gradient_norm import sum_once
from masters import gather_masters, load_state, pieces, write_state
from partition import costs, describe, layers_by_stage
from stages import DecoderPipeline, check_family, check_head, checkpoint_activations, stage_count, warn_of_waiting

from common import data, errors, evaluation, models, runtime
from common.checkpoints import Checkpoints, identity
from common.ds_settings import engine_settings, restore_scaler, scaler_state
from common.hub import check_can_push
from common.metrics import peak_gpu_gib
from common.run_folder import RunFolder
from common.schedule import lr_schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP_PARAMETERS = 64e6  # that AdamW updates at a time; an embedding may be larger


def setup_distributed(cfg: Config) -> tuple[int, int, torch.device]:
    """Join the process group that the launcher describes in the environment; return rank, world size and device."""
    gpus = torch.cuda.device_count()
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
    deepspeed.init_distributed(dist_backend=options["backend"], auto_mpi_discovery=False)  # takes what is there
    return dist.get_rank(), dist.get_world_size(), device


def build_model(
    cfg: Config, settings: dict, partition: list[int], device: torch.device, dtype: torch.dtype
) -> tuple[deepspeed.PipelineEngine, PreTrainedModel]:
    """DeepSpeed's engine with this rank's stage in `dtype` on its device, and the model that the stage is a part of.

    The parameters of the other stages are on the `meta` device: they have names and shapes, but no memory.
    """
    model = models.empty_model(cfg.model).to(dtype)
    check_head(model)
    models.use_fused_attention(model, device, dtype)
    if cfg.train.compile:
        for layer in models.decoder_layers(model):
            layer.compile()
    pipeline = DecoderPipeline(
        model,
        partition,
        device,
        activation_checkpoint_interval=int(cfg.train.activation_checkpointing),
        activation_checkpoint_func=checkpoint_activations,
        checkpointable_layers=["DecoderLayer"],
        # Full blocks have one length; other micro-batches do not, and a stage must then know what will arrive.
        dynamic_shape=cfg.data.packing != "wrapped",
    )
    groups = models.parameter_groups(model, cfg.train.weight_decay)
    groups = [{**group, "params": [p for p in group["params"] if not p.is_meta]} for group in groups]
    # NOTE: a step copies a group's gradients to fp32 and then frees them. So groups are small, and the largest, the
    # embedding, comes last: the gradients of all others have made room for its copy.
    groups = models.small_groups(groups, GROUP_PARAMETERS)
    groups.sort(key=lambda group: sum(p.numel() for p in group["params"]))
    optimizer = torch.optim.AdamW(groups, lr=cfg.train.learning_rate, fused=True)
    engine, *_ = deepspeed.initialize(model=pipeline, optimizer=optimizer, config=settings)
    sum_once(engine.optimizer)
    read_weights(cfg, engine.optimizer, model)
    return engine, model


@torch.no_grad()
def read_weights(cfg: Config, zero, model: PreTrainedModel) -> None:
    """Fill this rank's masters, and from them the weights. Of published weights only what this stage has is read."""
    source = models.load_model(cfg.model, cfg.seed, dtype="auto")  # mapped, not copied
    for piece in pieces(zero, model):
        value = source.get_parameter(piece.name).flatten()[piece.begin : piece.end]
        piece.of(zero.single_partition_of_fp32_groups[piece.group]).copy_(value)
    zero.update_lp_params()


def build_dataloaders(cfg: Config, tokenizer, rank: int, world_size: int):
    """This pipeline's training rows, and its share of the held-out batches."""
    rows, held_out_rows = data.tokenized_rows(cfg.data, cfg.seed, tokenizer, show_progress=dist.get_rank() == 0)
    batches = evaluation.held_out_batches(held_out_rows, cfg.eval.batch_size, tokenizer.pad_token_id, rank, world_size)
    return rows, batches


def train_step(engine, batch: data.StepBatch, device) -> tuple[float, float, int]:
    """One optimizer step over the global batch; returns its loss, its gradient norm before clipping, and its tokens.

    The loss is the sum of all token losses divided by the number of target tokens, both over the whole global batch.
    """
    counts = torch.tensor([batch.targets, batch.tokens], dtype=torch.float64, device=device)
    dist.all_reduce(counts, group=engine.grid.get_data_parallel_group())  # all stages of a pipeline count the same
    # DeepSpeed averages over the micro-batches and over the pipelines, gradients and loss; the loss is a sum over both.
    factor = len(batch.micro_batches) * engine.grid.get_data_parallel_world_size() / counts[0].float()
    # NOTE: (inputs, labels), no third: DeepSpeed takes the first two, and of (ids, mask, labels) the mask for labels.
    micro_batches = ((inputs_of(m), (m["labels"], factor)) for m in batch.micro_batches)
    # The whole schedule: each stage does forwards and backwards in turn; then all add up, clip and step. What comes
    # back is the last stage's loss, on every rank.
    loss = engine.train_batch(micro_batches)
    return loss.item(), float(engine.get_global_grad_norm()), int(counts[1].item())


def inputs_of(micro_batch: dict[str, torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What the first stage is given: token ids, and with blocks of several documents the positions in each."""
    ids = micro_batch["input_ids"]
    return (ids, micro_batch["position_ids"]) if "position_ids" in micro_batch else ids


def evaluate(engine, batches, device) -> float:
    """Mean token loss over the held-out rows, the same for any number of stages and pipelines."""
    micro_batches = ((batch["input_ids"], (batch["labels"], torch.ones(()))) for batch in batches)
    # Held-out batches have lengths of their own. Both ends of a link must forget the shape that they agreed on.
    dynamic_shape, engine.dynamic_shape = engine.dynamic_shape, True
    engine.total_loss = None  # train_batch's: eval_batch would add its own sums to it
    outputs = engine.eval_batch(micro_batches, reduce_output=None, bcast_loss=False, num_micro_batches=len(batches))
    engine.dynamic_shape = dynamic_shape
    engine.reset_activation_shape()
    sums = sum(outputs) if engine.is_last_stage() else torch.zeros(3, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def save_checkpoint(checkpoints: Checkpoints, step: int, engine, model) -> None:
    """Write everything that the next step depends on. Every rank writes its own pieces of masters and moments.

    NOTE: not engine.save_checkpoint: its files are by layer number and by rank, and only the same grid reads them.
    """
    rank, zero = dist.get_rank(), engine.optimizer
    if rank == 0:
        checkpoints.begin(step)
    dist.barrier()
    folder = checkpoints.writing(step)
    runtime.save_rng(folder, rank)
    steps = write_state(zero, model, folder / "state")
    if rank == 0:
        torch.save({"steps": steps, "scaler": scaler_state(zero.loss_scaler)}, folder / "training.pt")
    dist.barrier()
    if rank == 0:
        checkpoints.commit(step)
    dist.barrier()


@torch.no_grad()
def load_checkpoint(folder: Path, engine, model) -> None:
    """Put back what `save_checkpoint` wrote; the number of stages and of pipelines may have changed."""
    zero, saved = engine.optimizer, torch.load(folder / "training.pt", weights_only=True)
    load_state(zero, model, folder / "state", saved["steps"])
    restore_scaler(zero.loss_scaler, saved["scaler"])
    runtime.load_rng(folder, dist.get_rank())


def train(cfg: Config) -> None:
    ds_config = read_ds_config(cfg.pipeline.ds_config, Path(__file__).parent)
    rank, world_size, device = setup_distributed(cfg)
    stop = runtime.StopRequest(cfg.runtime)
    dtype, reason = runtime.resolve_precision(cfg.train.precision, device)
    stages = stage_count(cfg.pipeline.stages, world_size)
    pipelines, pipeline = world_size // stages, rank % (world_size // stages)  # neighbours share a stage
    micro_batches = accumulation_steps(cfg, pipelines, "pipelines")  # refuses a global batch that cannot be split
    settings = engine_settings(ds_config, cfg, dtype, micro_batches, get_accelerator().is_fp16_supported())
    if rank == 0:
        warn_of_waiting(cfg, stages, pipelines, micro_batches)
        check_can_push(cfg)
    runtime.seed_everything(cfg.seed)
    runtime.only_main_shows_progress(rank == 0)
    environment = runtime.describe_environment(world_size, reason)
    with RunFolder(cfg, PROJECT, rank == 0, environment) as run, runtime.explain_out_of_memory(cfg):
        tokenizer = models.load_tokenizer(cfg.model)
        model_config = models.load_model_config(cfg.model, cfg.data)
        check_family(model_config, cfg.model.name)
        rows, held_out = build_dataloaders(cfg, tokenizer, pipeline, pipelines)
        run.log_rows(rows.counts)
        measure = partial(costs, cfg, model_config, device, dtype)
        partition, found_costs = layers_by_stage(model_config, cfg.pipeline.partition, stages, measure)
        environment["pipeline"] = {"layers_by_stage": partition, "pipelines": pipelines, "micro_batches": micro_batches}
        if found_costs:
            environment["pipeline"][f"{cfg.pipeline.partition}_costs"] = found_costs._asdict()
        if rank == 0:
            print(describe(partition, found_costs, cfg.pipeline.partition))
        engine, model = build_model(cfg, settings, partition, device, dtype)
        zero = engine.optimizer

        same_run = identity(cfg, PROJECT, models.architecture(model_config), rows.fingerprint())
        checkpoints = Checkpoints(run.checkpoints, cfg.checkpoint.keep, same_run)
        found = [checkpoints.find(cfg.checkpoint.resume) if rank == 0 else None]
        dist.broadcast_object_list(found)
        first_step, folder = found[0] or (0, None)
        loader = data.step_loader(rows, cfg, tokenizer.pad_token_id, pipeline, pipelines, first_step)
        total_steps, steps_per_epoch = loader.batch_sampler.total_steps, loader.batch_sampler.steps_per_epoch
        if folder:
            load_checkpoint(folder, engine, model)
        schedule = lr_schedule(cfg, zero.optimizer, total_steps, first_step)
        run.begin(model, device, dtype, first_step, total_steps, folder)
        if first_step == 0:
            run.log_evaluation(0, evaluate(engine, held_out, device))

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
                run.log_evaluation(step, evaluate(engine, held_out, device))
            if step == total_steps or stopping or (cfg.checkpoint.every and step % cfg.checkpoint.every == 0):
                save_checkpoint(checkpoints, step, engine, model)
            if stopping and step < total_steps:
                return run.finish("interrupted", stop.reason, **peaks(device))
            clock = time.perf_counter()
        run.save_model(model, gather_masters(zero, model, device))
        run.finish("completed", **peaks(device))


def peaks(device: torch.device) -> dict:
    """The GPU memory of each rank at its peak, GiB: every stage has its own. The largest is the run's."""
    by_rank = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, round(peak_gpu_gib(device), 3))
    return {"peak_gpu_gib": max(by_rank) or None, "peak_gpu_gib_by_rank": by_rank}


def main() -> None:
    train(parse_config(Config, __file__))
    dist.destroy_process_group()


if __name__ == "__main__":
    errors.run(main)
