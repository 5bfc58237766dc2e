"""Search hyper-parameters with Ray Tune and ASHA: many trials of one GPU each, the bad ones stopped early.

A trial is the training loop of pytorch-ddp for one GPU. It reports its held-out loss every few optimizer steps, and
ASHA stops it if earlier trials were better at the same step. All trials have the same budget and the same schedule.

    ray-tune/launch.sh                                           # the real search: one trial at a time on each GPU
    ray-tune/launch.sh --config smoke.yaml                       # no network, no GPU: two trials at a time on the CPU
    python ray-tune/train.py --config smoke.yaml search.trials=10 search.algorithm=optuna    # any key can be set

`--help` lists all keys. A search that was stopped or killed resumes when the same command is given again.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from settings import PROJECT, Config

from common.config import accumulation_steps, check_command_line, parse_config

if __name__ == "__main__":
    check_command_line(Config, __file__)  # before torch is imported, which takes seconds

import asha
import cluster
import outcome
import space
from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from trainable import Trial
from trial import build_dataloaders, train
from trials import Spans, Trials, best, lock
from watch import Stopping, Watch

from common import data, errors, models, runtime
from common.export import check_export
from common.hub import check_can_push
from common.ray_address import joined


def search(cfg: Config) -> None:
    """Run all trials, then bring the best one to the full budget, export it and print what the search found."""
    domains = space.param_space(cfg)
    cluster.check(cfg)
    space.check_search(cfg, cfg.train.max_steps)
    accumulation_steps(cfg, 1)
    check_can_push(cfg)
    if os.path.exists(cfg.model.name):  # trials may have another working directory
        cfg.model.name = os.path.abspath(cfg.model.name)
    root = Path(cfg.output_dir).resolve()
    only_one = lock(root / ".lock", 0, f"output_dir={cfg.output_dir}: another search is running in it; choose another")
    stop = runtime.StopRequest(cfg.runtime)
    check_export(cfg.model, root / "model", cfg.export.dtype)
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
    for _ in train(final, tokenizer, rows, held_out, stop, is_trial=False, started_at=time.time()):
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
                # A trial's own checkpoints are written atomically; Ray's copies would not be, after a kill.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
    tuner.fit()


def main() -> None:
    search(parse_config(Config, __file__))


if __name__ == "__main__":
    errors.run(main)
