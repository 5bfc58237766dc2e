"""Fine-tune a language model on one GPU: the training loop that the other projects spread over several.

No framework and no process group. `diff ray-tune/trial.py pytorch-ddp/train.py` shows what data parallelism adds. In a
search (train.py), each trial runs this loop with hyper-parameters of its own.

    python ray-tune/trial.py                                     # the first trial of the search, by itself: one GPU
    python ray-tune/trial.py --config smoke.yaml                 # no network, no GPU
    python ray-tune/trial.py --config smoke.yaml train.max_steps=20 output_dir=runs/mine      # any key can be set

`--help` lists all keys. A run that was stopped or killed resumes when the same command is given again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from settings import PROJECT, Config

from common.config import accumulation_steps, check_command_line, parse_config

if __name__ == "__main__":
    check_command_line(Config, __file__)  # before torch is imported, which takes seconds

import torch

from common import data, errors, evaluation, models, runtime
from common.checkpoints import Checkpoints, identity
from common.hub import check_can_push
from common.loss import CausalLMLoss
from common.run_folder import RunFolder
from common.schedule import lr_schedule


def setup_device(cfg: Config) -> torch.device:
    """The first GPU that this process sees (in a search Ray shows it one), or the CPU."""
    device = torch.device("cuda", 0) if torch.cuda.device_count() else torch.device("cpu")
    runtime.check_device(cfg, device)
    runtime.limit_gpu_memory(cfg.runtime, device)
    return device


def build_model(cfg: Config, device: torch.device, dtype: torch.dtype) -> CausalLMLoss:
    """The model on the device, its weights fp32 masters."""
    model = models.load_model(cfg.model, cfg.seed).to(device)
    model.train()
    models.use_fused_attention(model, device, dtype)
    if cfg.train.activation_checkpointing:
        models.checkpoint_activations(model)
    if cfg.train.compile:
        for layer in models.decoder_layers(model):
            layer.compile()
    return CausalLMLoss(model, autocast=dtype)


def build_dataloaders(cfg: Config, tokenizer):
    """The training rows and the held-out batches; in a search, made once for all trials."""
    rows, held_out_rows = data.tokenized_rows(cfg.data, cfg.seed, tokenizer, show_progress=True)
    batches = evaluation.held_out_batches(held_out_rows, cfg.eval.batch_size, tokenizer.pad_token_id, 0, 1)
    return rows, batches


def train_step(model, batch: data.StepBatch, optimizer, scaler, cfg: Config, device) -> tuple[float, float, int]:
    """One optimizer step over the global batch; returns its loss, its gradient norm before clipping, and its tokens.

    The loss is the sum of all token losses divided by the number of target tokens, both over the whole global batch: it
    does not depend on the micro-batch.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in batch.micro_batches:
        micro_batch = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
        loss = model(**micro_batch)
        scaler.scale(loss * (1 / batch.targets)).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.max_grad_norm or math.inf)
    scaler.step(optimizer)  # does nothing if a gradient is not finite
    scaler.update()
    optimizer.zero_grad(set_to_none=False)
    return (loss_sum / batch.targets).item(), norm.item(), batch.tokens


def evaluate(model, batches, device) -> float:
    """Mean token loss over the held-out rows."""
    sums = evaluation.evaluate(model, batches, device)
    return (sums[0] / sums[1]).item()


def save_checkpoint(checkpoints: Checkpoints, step: int, model, optimizer, scaler) -> None:
    """Write everything that the next step depends on."""
    checkpoints.begin(step)
    folder = checkpoints.writing(step)
    runtime.save_rng(folder, 0)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "training.pt")
    checkpoints.commit(step)


def load_checkpoint(folder: Path, model, optimizer, scaler) -> None:
    """Put back what `save_checkpoint` wrote."""
    state = torch.load(folder / "training.pt", map_location="cpu", mmap=True, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty unless the run was in fp16 so far
        scaler.load_state_dict(state["scaler"])
    runtime.load_rng(folder, 0)


def train(
    cfg: Config, tokenizer, rows: data.TokenizedRows, held_out, stop, is_trial: bool, started_at: float | None = None
) -> Iterator[dict[str, Any]]:
    """The training loop. Yields each held-out loss, before the last, to the caller, who may close it to stop the run.

    `stop.reason` says when to save and leave. A trial exports no model: only the best one's is needed. `started_at` is
    when this run of a search began.
    """
    device = setup_device(cfg)
    dtype, reason = runtime.resolve_precision(cfg.train.precision, device)
    runtime.seed_everything(cfg.seed)
    runtime.only_main_shows_progress(not is_trial)
    environment = runtime.describe_environment(1, reason) | ({"started_at": started_at} if started_at else {})
    with (
        RunFolder(cfg, PROJECT, True, environment, exports=not is_trial, advice="") as run,
        runtime.explain_out_of_memory(cfg),
    ):
        architecture = models.architecture(models.load_model_config(cfg.model, cfg.data))
        run.log_rows(rows.counts)
        model = build_model(cfg, device, dtype)
        groups = models.parameter_groups(model, cfg.train.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=cfg.train.learning_rate, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        same_run = identity(cfg, PROJECT, architecture, rows.fingerprint())
        checkpoints = Checkpoints(run.checkpoints, cfg.checkpoint.keep, same_run)
        first_step, folder = checkpoints.find(cfg.checkpoint.resume) or (0, None)
        loader = data.step_loader(rows, cfg, tokenizer.pad_token_id, 0, 1, first_step)
        total_steps, steps_per_epoch = loader.batch_sampler.total_steps, loader.batch_sampler.steps_per_epoch
        if folder:
            load_checkpoint(folder, model, optimizer, scaler)
        # NOTE: always over the full budget, even if the trial will be stopped: only then are trials comparable.
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
            stopping, result = stop.reason, {}
            # Also if the run is to stop: it resumes after this step, and a rung needs the loss.
            if step == total_steps or (cfg.eval.every and step % cfg.eval.every == 0):
                result = {"step": step, "eval_loss": evaluate(model, held_out, device)}
                run.log_evaluation(**result)
            if step == total_steps or stopping or (cfg.checkpoint.every and step % cfg.checkpoint.every == 0):
                save_checkpoint(checkpoints, step, model, optimizer, scaler)
            if stopping and step < total_steps:
                return run.finish("interrupted", stopping)
            if result and step < total_steps:
                try:
                    yield result
                except GeneratorExit:
                    return run.finish("interrupted" if stop.reason else "stopped", stop.reason)
            clock = time.perf_counter()
        if not is_trial:
            run.save_model(model.model)
        run.finish("completed")


def main() -> None:
    cfg = parse_config(Config, __file__, run_name="trial")  # not the search's folder
    accumulation_steps(cfg, 1)  # refuses a global batch that cannot be split
    check_can_push(cfg)
    tokenizer = models.load_tokenizer(cfg.model)
    rows, held_out = build_dataloaders(cfg, tokenizer)
    for _ in train(cfg, tokenizer, rows, held_out, runtime.StopRequest(cfg.runtime), is_trial=False):
        pass  # each held-out loss, for whoever would stop the run


if __name__ == "__main__":
    errors.run(main)
