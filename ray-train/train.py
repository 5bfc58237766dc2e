"""Fine-tune a language model with Ray Train and DeepSpeed ZeRO-3.

Ray places a worker on every GPU of a cluster, starts the workers again when one dies, and keeps the checkpoints. In the
workers ZeRO-3 trains: each rank keeps a part of every weight, gradient and Adam moment, and gathers a layer's weights
just before the layer computes.

    ray-train/launch.sh                                        # the real run: a worker for each GPU found
    ray-train/launch.sh --config smoke.yaml                    # no network, no GPU: two workers on the CPU
    RAY_ADDRESS=10.0.0.1:6379 ray-train/launch.sh              # in a cluster of several machines
    torchrun --nproc_per_node 2 ray-train/train.py             # the same loop without a cluster

`--help` lists all keys. A run that was stopped or killed resumes when the same command is given again.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from settings import PROJECT, Config

from common.config import accumulation_steps, check_command_line, parse_config
from common.ds_settings import without_mlflow

if __name__ == "__main__":
    check_command_line(Config, __file__)  # before torch is imported, which takes seconds

with without_mlflow():
    import deepspeed

import ray.train
import torch
import torch.distributed as dist
from cluster import place, ray_cluster
from deepspeed.utils import safe_get_full_fp32_param
from driver import Failures, fit, open_run_folder, output_to
from ds_settings import engine_settings, read_ds_config
from partitions import deal_out, load_parts, own_parts, partition_empty, steps_done
from ray.train.torch import TorchConfig, TorchTrainer
from worker import kept_by_us, nodes, report, report_earlier, run_without_cluster, where_to_resume

from common import data, errors, evaluation, models, runtime
from common.checkpoints import Checkpoints, identity
from common.ds_settings import restore_scaler, scaler_state
from common.hub import check_can_push
from common.loss import CausalLMLoss
from common.run_folder import RunFolder
from common.schedule import lr_schedule


def setup_distributed(cfg: Config) -> tuple[int, int, torch.device]:
    """Ray has joined the process group already; return rank, world size and device."""
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    runtime.check_device(cfg, device)
    if gpus:
        runtime.limit_gpu_memory(cfg.runtime, device)
    else:  # gloo does what DeepSpeed would first compile a shared-memory operator for
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed takes it for the GPU's number. Ray counts a machine's workers, which may be on nodes with a GPU each.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)  # it takes the group that is there
    return dist.get_rank(), dist.get_world_size(), device


def build_model(cfg: Config, settings: dict, device: torch.device, dtype: torch.dtype) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine: of every weight, in `dtype` and as fp32 master, each rank has one part."""
    model = models.empty_model(cfg.model)  # modules without weights: no rank ever holds the whole model
    model.train()
    models.use_fused_attention(model, device, dtype)
    if cfg.train.activation_checkpointing:
        models.checkpoint_activations(model)
    partition_empty(model, settings, device, dtype)
    # A decoder layer's weights are gathered at once, not linear by linear: fewer, larger messages and fewer hooks.
    deepspeed.utils.set_z3_leaf_modules(model, [type(models.decoder_layers(model)[0])])
    loss = CausalLMLoss(model)
    # NOTE: ZeRO-3 gathers a module's own weights when it is called. The loss takes the output head's weight and never
    # calls the head; so that weight is gathered for the module that computes the loss as well.
    deepspeed.zero.register_external_parameter(loss, model.get_output_embeddings().weight)
    groups = models.parameter_groups(model, cfg.train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.train.learning_rate, fused=True)
    engine, *_ = deepspeed.initialize(model=loss, optimizer=optimizer, config=settings)
    # Only rank 0 reads the weights; it distributes them tensor by tensor.
    source = models.load_model(cfg.model, cfg.seed, dtype="auto") if dist.get_rank() == 0 else None
    deal_out(model, engine.optimizer, source, device)
    return engine


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
        # NOTE: scale_wrt_gas would divide by the number of micro-batches too. After each of them the gradients go to
        # the ranks that own them: ZeRO-3 has no no_sync.
        engine.backward(loss * scale, scale_wrt_gas=False)
        loss_sum += loss.detach()
        engine.step()  # does nothing before the last micro-batch; then unscale, clip, AdamW on this rank's parts
    dist.all_reduce(loss_sum)
    return (loss_sum / counts[0]).item(), float(engine.get_global_grad_norm()), int(counts[1].item())


def evaluate(module, batches, device) -> float:
    """Mean token loss over the held-out rows, the same for any number of ranks; `module` is the unwrapped loss."""
    sums = evaluation.evaluate(module, batches, device)
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def save_checkpoint(checkpoints: Checkpoints, step: int, engine) -> None:
    """Write everything that the next step depends on. Every rank writes its own parts, and reports them to Ray."""
    rank, zero = dist.get_rank(), engine.optimizer
    if rank == 0:
        checkpoints.begin(step)
    dist.barrier()
    folder = checkpoints.writing(step)
    runtime.save_rng(folder, rank)
    torch.save(own_parts(engine.module.model, zero), folder / f"parts-{rank}.pt")
    if rank == 0:
        saved = {"ranks": dist.get_world_size(), "steps": steps_done(zero), "scaler": scaler_state(zero.loss_scaler)}
        torch.save(saved, folder / "training.pt")
    dist.barrier()
    if rank == 0:
        checkpoints.commit(step)
    dist.barrier()
    report(checkpoints.folder(step))


@torch.no_grad()
def load_checkpoint(folder: Path, engine) -> None:
    """Put back what `save_checkpoint` wrote; the number of ranks, and so the parts, may have changed."""
    zero, saved = engine.optimizer, torch.load(folder / "training.pt", weights_only=True)
    load_parts(engine.module.model, zero, folder, saved["ranks"], saved["steps"])
    restore_scaler(zero.loss_scaler, saved["scaler"])
    runtime.load_rng(folder, dist.get_rank())


def train_loop_per_worker(config: dict) -> None:
    """What runs in every worker. Ray sends this function and its argument there; it must need nothing else."""
    logging.getLogger().setLevel(logging.WARNING)  # Ray sets INFO
    with output_to(config["console"] if ray.train.get_context().get_world_rank() == 0 else None):
        train(config["cfg"], config["ds_config"], config["stop"], config["started_at"])


def train(cfg: Config, ds_config: dict, stop, started_at: float) -> None:
    rank, world_size, device = setup_distributed(cfg)
    dtype, reason = runtime.resolve_precision(cfg.train.precision, device)
    settings = engine_settings(ds_config, cfg, dtype, accumulation_steps(cfg, world_size))
    if rank == 0:
        check_can_push(cfg)
    cfg.checkpoint.resume = where_to_resume(cfg.checkpoint.resume)
    runtime.seed_everything(cfg.seed)
    runtime.only_main_shows_progress(rank == 0)
    environment = runtime.describe_environment(world_size, reason) | {"nodes": nodes(), "started_at": started_at}
    with RunFolder(cfg, PROJECT, rank == 0, environment) as run, runtime.explain_out_of_memory(cfg):
        tokenizer = models.load_tokenizer(cfg.model)
        architecture = models.architecture(models.load_model_config(cfg.model, cfg.data))
        rows, held_out = build_dataloaders(cfg, tokenizer, rank, world_size)
        run.log_rows(rows.counts)
        engine = build_model(cfg, settings, device, dtype)
        model, zero = engine.module.model, engine.optimizer

        same_run = identity(cfg, PROJECT, architecture, rows.fingerprint())
        checkpoints = Checkpoints(run.checkpoints, kept_by_us(cfg.checkpoint.keep), same_run)
        found = [checkpoints.find(cfg.checkpoint.resume) if rank == 0 else None]
        dist.broadcast_object_list(found)
        first_step, folder = found[0] or (0, None)
        loader = data.step_loader(rows, cfg, tokenizer.pad_token_id, rank, world_size, first_step)
        total_steps, steps_per_epoch = loader.batch_sampler.total_steps, loader.batch_sampler.steps_per_epoch
        if folder:
            load_checkpoint(folder, engine)
        schedule = lr_schedule(cfg, zero.optimizer, total_steps, first_step)
        shapes = models.empty_model(cfg.model)  # between steps, the engine's weights have no shape
        run.begin(shapes, device, dtype, first_step, total_steps, folder)
        report_earlier(checkpoints, first_step)
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
        # The masters, gathered one by one.
        weights = dict(zip(shapes.parameters(), model.parameters(), strict=True))
        run.save_model(shapes, lambda shape: safe_get_full_fp32_param(weights[shape]))
        run.finish("completed")


def main() -> int:
    cfg = parse_config(Config, __file__)
    ds_config = read_ds_config(cfg.ray.ds_config, Path(__file__).parent)
    settings = {"cfg": cfg, "ds_config": ds_config, "started_at": runtime.command_started_at()}
    request = runtime.StopRequest(cfg.runtime)
    if "RANK" in os.environ:  # torchrun or deepspeed has started this process as a worker
        return run_without_cluster(train_loop_per_worker, settings | {"stop": request, "console": None})
    with ray_cluster() as resources:
        workers, use_gpu = place(cfg.ray.workers, resources)
        console, stop = open_run_folder(cfg)
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config=settings | {"stop": stop, "console": console},
            torch_config=TorchConfig("nccl" if use_gpu else "gloo", timeout_s=int(cfg.runtime.timeout_minutes * 60)),
            scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=ray.train.RunConfig(
                name="checkpoints",
                storage_path=cfg.output_dir,
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=cfg.checkpoint.keep),
                failure_config=ray.train.FailureConfig(max_failures=cfg.ray.max_failures, controller_failure_limit=0),
                logging_config=ray.train.LoggingConfig("ERROR"),
                callbacks=[Failures(console, cfg.ray.max_failures)],
            ),
        )
        return fit(trainer, request, stop, console)


if __name__ == "__main__":
    # NOTE: as a module, which the workers import by its name. What a script defines, Ray would have to send as code.
    from train import main

    errors.run(main)
