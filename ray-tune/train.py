"""Search hyper-parameters with Ray Tune and ASHA: many trials of one GPU each, the bad ones stopped early.

A trial is the training loop of pytorch-ddp for one GPU. It reports its held-out loss every so many optimizer steps, and
ASHA stops it where earlier trials were better at the same step. All trials have the same budget and the same schedule.

    ray-tune/launch.sh                                           # the real search: one trial at a time on each GPU
    ray-tune/launch.sh --config smoke.yaml                       # no network, no GPU: two trials at a time on the CPU
    python ray-tune/train.py --config smoke.yaml search.trials=10 search.algorithm=optuna    # any key can be set

`--help` lists all keys. A search that was stopped or killed goes on when the same command is given again.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from settings import PROJECT, Config

from common.config import accumulation_steps, check_command_line, parse_config

if __name__ == "__main__":
    check_command_line(Config, __file__)  # before torch is imported, which takes seconds

import asha
import cluster
import outcome
import space
import torch
from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from trials import Spans, Trials, best, lock
from watch import Stopping, Watch

from common import data, errors, evaluation, models, runtime
from common.checkpoints import Checkpoints, identity
from common.console import output_to
from common.errors import UserError
from common.export import check_export
from common.hub import check_can_push
from common.loss import CausalLMLoss
from common.ray_address import joined
from common.run_folder import RunFolder, write_json
from common.schedule import lr_schedule


def setup_device(cfg: Config) -> torch.device:
    """The GPU that Ray gave this trial (the only one that it sees), or the CPU."""
    device = torch.device("cuda", 0) if torch.cuda.device_count() else torch.device("cpu")
    runtime.check_device(cfg, device)
    runtime.limit_gpu_memory(cfg.runtime, device)
    return device


def build_model(cfg: Config, device: torch.device, dtype: torch.dtype) -> CausalLMLoss:
    """The model on this trial's device, its weights fp32 masters."""
    model = models.load_model(cfg.model, cfg.seed).to(device)
    model.train()
    models.use_fused_attention(model, device, dtype)
    if cfg.train.activation_checkpointing:
        models.checkpoint_activations(model)
    if cfg.train.compile:
        for layer in models.decoder_layers(model):
            layer.compile()
    return CausalLMLoss(model)


def build_dataloaders(cfg: Config, tokenizer):
    """All training rows and held-out batches: made once, for all trials."""
    rows, held_out_rows = data.tokenized_rows(cfg.data, cfg.seed, tokenizer, show_progress=True)
    batches = evaluation.held_out_batches(held_out_rows, cfg.eval.batch_size, tokenizer.pad_token_id, 0, 1)
    return rows, batches


def train_step(model, batch: data.StepBatch, optimizer, scaler, cfg: Config, device, dtype) -> tuple[float, float, int]:
    """One optimizer step over the global batch; returns its loss, its gradient norm before clipping, and its tokens.

    The loss is the sum of all token losses divided by the number of target tokens, both over the whole global batch: it
    does not depend on the micro-batch.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in batch.micro_batches:
        micro_batch = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**micro_batch)
        scaler.scale(loss * (1 / batch.targets)).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.max_grad_norm or math.inf)
    scaler.step(optimizer)  # does nothing if a gradient is not finite
    scaler.update()
    optimizer.zero_grad(set_to_none=False)
    return (loss_sum / batch.targets).item(), norm.item(), batch.tokens


def evaluate(model, batches, device, dtype) -> float:
    """Mean token loss over the held-out rows."""
    sums = evaluation.evaluate(model, batches, device, dtype)
    return (sums[0] / sums[1]).item()


def save_checkpoint(checkpoints: Checkpoints, step: int, model, optimizer, scaler) -> None:
    """Write everything that the next step depends on."""
    checkpoints.begin(step)
    folder = checkpoints.writing(step)
    torch.save(runtime.rng_state(), folder / "rng-0.pt")
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
    runtime.set_rng_state(torch.load(folder / "rng-0.pt", weights_only=True))


def train(cfg: Config, tokenizer, rows: data.TokenizedRows, held_out, stop, is_trial: bool) -> Iterator[dict[str, Any]]:
    """The training loop; yields each held-out loss to whoever decides whether it goes on. Closed there, it stops.

    `stop.reason` says when to save and leave. A trial exports no model: only the best one's is wanted.
    """
    device = setup_device(cfg)
    dtype, reason = runtime.resolve_precision(cfg.train.precision, device)
    runtime.seed_everything(cfg.seed)
    runtime.only_main_shows_progress(not is_trial)
    environment = runtime.describe_environment(1, reason)
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
        # NOTE: always over the full budget, also for trials that will be stopped: only then are they comparable.
        schedule = lr_schedule(cfg, optimizer, total_steps, first_step)
        run.begin(model.model, device, dtype, first_step, total_steps, folder)
        if first_step == 0:
            run.log_evaluation(0, evaluate(model, held_out, device, dtype))

        skipped, clock = 0, time.perf_counter()
        for step, batch in enumerate(loader, first_step + 1):
            learning_rate, loss_scale = schedule.get_last_lr()[0], scaler.get_scale()
            loss, grad_norm, tokens = train_step(model, batch, optimizer, scaler, cfg, device, dtype)
            schedule.step()
            skipped = skipped + 1 if scaler.get_scale() < loss_scale else 0
            runtime.check_finite(step, loss, skipped)
            run.log_step(
                step,
                epoch=round(step / steps_per_epoch, 4),
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                tokens=tokens,
                seconds=time.perf_counter() - clock,
            )
            stopping, result = stop.reason, {}
            # Also where the run is to stop: it goes on behind this step, and a rung needs the loss.
            if step == total_steps or (cfg.eval.every and step % cfg.eval.every == 0):
                result = {"step": step, "eval_loss": evaluate(model, held_out, device, dtype)}
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


class Trial(tune.Trainable):
    """What Ray runs in a process of its own for each trial: `train`, from one report to the next."""

    def setup(self, config: dict[str, Any], cfg: Config, trials: Trials, tokenizer, rows, held_out) -> None:
        if not trials.root.parent.is_dir():
            raise UserError(f"output_dir={trials.root.parent} is not on this machine: all machines must share it")
        self.trials, self.record = trials, trials.read(self.trial_name)
        self.training, self.output = iter(()), contextlib.ExitStack()
        if self.record.status == "failed":
            raise UserError(self.record.error)
        if self.record.status:  # Ray's state was older than the kill: this trial had ended
            return
        folder = self.record.folder
        # NOTE: kept as long as this process lives, so that one that outlived a killed search cannot write beside it.
        self.lock = lock(folder / ".lock", 60, f"{folder}: another process still writes there; try again in a minute")
        write_json(folder / "parameters.json", config)
        self.stopping = Stopping(trials.root.parent)
        self.output.enter_context(output_to(trials.console(self.trial_name)))
        cfg = copy.deepcopy(cfg)
        cfg.train, cfg.output_dir = space.with_parameters(cfg, config), str(folder)
        cfg.hub.repo_id = ""
        os.environ["WANDB_RUN_GROUP"] = folder.parent.parent.name
        self.training = train(cfg, tokenizer, rows, held_out, self.stopping, is_trial=True)

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation; its result for ASHA, the table and the search algorithm."""
        if result := next(self.training, None):
            return result
        record = self.trials.read(self.trial_name)
        step, eval_loss = record.last
        interrupted = not self.record.status and step < self.trials.total_steps
        return {"step": step, "eval_loss": eval_loss, "done": not interrupted, "interrupted": interrupted}

    def cleanup(self) -> None:
        """ASHA has stopped the trial, or the search ends: `train` meets it where it last reported."""
        if hasattr(self.training, "close"):
            self.training.close()
            self.lock.close()
        self.output.close()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial takes over the process, so that it need not load Python's libraries and CUDA again."""
        self.cleanup()
        self.training = None
        gc.collect()
        torch.compiler.reset()  # what is compiled belongs to the old model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.setup(new_config)
        return True


def search(cfg: Config) -> None:
    """Run all trials, then bring the best one to the full budget, export it and say what the search found."""
    domains = space.param_space(cfg)
    cluster.check(cfg)
    space.check_search(cfg, cfg.train.max_steps)
    accumulation_steps(cfg, 1)
    check_can_push(cfg)
    if os.path.exists(cfg.model.name):  # trials may have another working directory
        cfg.model.name = os.path.abspath(cfg.model.name)
    root = Path(cfg.output_dir).resolve()
    only_one = lock(root / ".lock", 0, f"output_dir={cfg.output_dir}: another search runs in it; choose another one")
    stop = runtime.StopRequest(cfg.runtime)
    check_export(cfg.model, root / "model")
    tokenizer = models.load_tokenizer(cfg.model)
    models.load_model_config(cfg.model, cfg.data)
    rows, held_out = build_dataloaders(cfg, tokenizer)
    total_steps = data.StepSampler(rows, cfg, 0, 1).total_steps
    space.check_search(cfg, total_steps)
    rungs = asha.rungs(cfg.search.grace_period, cfg.search.reduction_factor, total_steps)
    trials = Trials(
        root / "trials", total_steps, rungs if cfg.search.scheduler == "asha" else [], cfg.search.reduction_factor
    )
    outcome.begin(cfg, root, rows.fingerprint())

    with Stopping(root).follow(stop):
        if len([record for record in trials.read_all() if record.status]) < cfg.search.trials:
            with cluster.ray_cluster(cfg, root) as placed:
                run_trials(cfg, trials, domains, tokenizer, rows, held_out, *placed)
        if stop.reason:
            return outcome.interrupted(cfg, PROJECT, trials, stop.reason)
    winner = best(trials.read_all())
    if winner is None:
        raise outcome.all_failed(cfg, PROJECT, trials)
    final = outcome.final_run(cfg, winner)
    for _ in train(final, tokenizer, rows, held_out, stop, is_trial=False):
        pass
    outcome.finish(cfg, trials, winner)
    only_one.close()


def run_trials(
    cfg: Config, trials: Trials, domains: dict, tokenizer, rows, held_out, slots: int, gpu_share: float
) -> None:
    """All trials that have not ended yet, `slots` at a time, each with `gpu_share` of a GPU."""
    Spans(trials.root.parent / "spans.jsonl").note("session", devices=slots)
    # The rows go into Ray's shared memory once, and every trial reads them there.
    trainable = tune.with_parameters(Trial, cfg=cfg, trials=trials, tokenizer=tokenizer, rows=rows, held_out=held_out)
    trainable = tune.with_resources(trainable, {"cpu": 1, "gpu": gpu_share})
    experiment = str(trials.root.parent / "tune")
    if tune.Tuner.can_restore(experiment):
        outcome.check_place(trials.root.parent)
        tuner = tune.Tuner.restore(experiment, trainable, param_space=domains)
    else:
        default = [space.default_parameters(cfg)]
        # A cluster of this machine has room for `slots` trials only, one that is there already for more.
        limit = slots if joined() and cfg.search.concurrent_trials else 0
        if cfg.search.algorithm == "optuna":
            algorithm = OptunaSearch(points_to_evaluate=default, seed=cfg.seed)
            algorithm = ConcurrencyLimiter(algorithm, limit) if limit else algorithm
        else:
            algorithm = BasicVariantGenerator(default, limit, random_state=cfg.seed)
        first = 1 if cfg.search.algorithm == "optuna" else 0  # what Ray counts from

        def name(trial) -> str:
            return trials.name(int(trial.experiment_tag.split("_")[0]) - first)

        tuner = tune.Tuner(
            trainable,
            param_space=domains,
            tune_config=tune.TuneConfig(
                metric="eval_loss",
                mode="min",
                num_samples=cfg.search.trials,
                search_alg=algorithm,
                scheduler=asha.OrderedASHA(trials, trials.rungs, trials.reduction_factor),
                trial_name_creator=name,
                trial_dirname_creator=name,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(trials.root.parent),
                callbacks=[Watch(trials, cfg.search.trials)],
                # A trial's own checkpoints are whole or not there; Ray's copies would not be, after a kill.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
    tuner.fit()


def main() -> None:
    search(parse_config(Config, __file__))


if __name__ == "__main__":
    # NOTE: as the module `train`, which Ray's processes can import; what __main__ holds would travel as a copy.
    import train as this

    errors.run(this.main)
