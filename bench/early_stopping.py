"""What early stopping costs and saves, over several draws of the trials: ray-tune's embedded search, on a CPU.

    python bench/early_stopping.py runs/early-stopping                # about five minutes a draw on two free cores
    python bench/early_stopping.py runs/early-stopping --seeds 42 1   # fewer draws

For each seed, twelve trials of smoke.yaml run to the end; the first six and nine are those that a search of six or
nine draws. From the whole curves, `replay` finds what a search with early stopping would have done, for any first rung
and any reduction: it asks the rule about each evaluation in the order in which two slots come to them, all trials
equally fast. Two rules: Ray's own AsyncHyperBandScheduler, and ray-tune/asha.py. Shares are of optimizer steps; the
micro-batch changes the seconds of a step by about a tenth here. Then real searches with early stopping show that they
do what the replay predicts.

How far two losses differ by chance: the best configuration of the first draws is trained from the same weights on the
same rows in other orders.

What lies in the folder is not run again. Writes results/ray-tune/early-stopping.json.
"""

import argparse
import dataclasses
import datetime
import heapq
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import torch
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "ray-tune"), str(REPOSITORY)]

import asha  # noqa: E402
import space  # noqa: E402
import trial as loop  # noqa: E402

from common import models, runtime  # noqa: E402
from common.config import ModelConfig, load_config  # noqa: E402
from common.report import read_json, read_metrics  # noqa: E402

SMOKE = REPOSITORY / "ray-tune" / "smoke.yaml"
TRIALS, SLOTS = 12, 2
SPACES = {"smoke.yaml": [], "warm-ups up to 40 steps": ["search.space.warmup_steps.choice=[0,20,40]"]}
GRID = [(n, grace, reduction) for n in (6, 9, 12) for grace in (25, 50, 75) for reduction in (2, 3, 4)]
ORDERS = range(1001, 1007)  # seeds of the training data's order, for the noise
NOISE_DRAWS, REAL_DRAWS = 2, 2


@dataclass
class Trial:
    parameters: dict
    losses: dict[int, float]  # optimizer step → held-out loss


@dataclass
class Outcome:
    """What a search with early stopping comes to."""

    steps: list[int]  # that each trial trains
    stopped: list[int]  # numbers of the trials that do not count to the end

    def best(self, trials: list[Trial]) -> int:
        return min((n for n in range(len(trials)) if n not in self.stopped), key=lambda n: final(trials[n]))

    def share(self, trials: list[Trial]) -> float:
        """Of the steps that the same trials take without early stopping."""
        return sum(self.steps) / sum(max(trial.losses) for trial in trials)

    def missed(self, trials: list[Trial]) -> float:
        """How far the final loss of the trial found is above the lowest of all."""
        return final(trials[self.best(trials)]) - min(final(trial) for trial in trials)


def final(trial: Trial) -> float:
    return trial.losses[max(trial.losses)]


def search(folder: Path, *settings: str) -> Path:
    """Run the embedded search, or resume it, and return its folder."""
    if read_json(folder / "summary.json").get("status") != "completed":
        settings = ["tracking.backend=none", "checkpoint.every=0", *settings, f"output_dir={folder}"]
        paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "ray-tune/train.py", "--config", "smoke.yaml", *settings]
        subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": paths}, check=True)
    return folder


def read_trials(folder: Path) -> list[Trial]:
    found = []
    for path in sorted((folder / "trials").glob("trial-*")):
        losses = {r["step"]: r["eval_loss"] for r in read_metrics(path) if "eval_loss" in r and r["step"]}
        found.append(Trial(read_json(path / "parameters.json"), losses))
    return found


def replay(trials: list[Trial], stops: Callable[[int, int, float], bool]) -> list[int]:
    """The step at which each trial ends. `stops(number, step, loss)` is asked at each evaluation, by the clock."""
    ended = [0] * len(trials)
    waiting = list(range(len(trials)))
    reports = []  # (time, number, time at which the trial began, steps yet to report)

    def begin(now: int) -> None:
        if waiting:
            number = waiting.pop(0)
            steps = sorted(trials[number].losses)
            heapq.heappush(reports, (now + steps[0], number, now, steps))

    for _ in range(SLOTS):
        begin(0)
    while reports:
        now, number, began, (step, *rest) = heapq.heappop(reports)
        if stops(number, step, trials[number].losses[step]) or not rest:
            ended[number] = step
            begin(now)
        else:
            heapq.heappush(reports, (began + rest[0], number, began, rest))
    return ended


def with_rays_rule(trials: list[Trial], grace: int, reduction: int) -> Outcome:
    total = max(trials[0].losses)
    scheduler = AsyncHyperBandScheduler("step", "eval_loss", "min", total, grace, reduction)
    rays = [SimpleNamespace(trial_id=str(number)) for number in range(len(trials))]
    for trial in rays:
        scheduler.on_trial_add(None, trial)

    def stops(number: int, step: int, loss: float) -> bool:
        decision = scheduler.on_trial_result(None, rays[number], {"step": step, "eval_loss": loss})
        return decision == TrialScheduler.STOP

    steps = replay(trials, stops)
    return Outcome(steps, [n for n, step in enumerate(steps) if step < total])


def with_our_rule(trials: list[Trial], grace: int, reduction: int) -> Outcome:
    total = max(trials[0].losses)
    rungs = asha.rungs(grace, reduction, total)
    seen: list[dict[int, float]] = [{} for _ in trials]
    ended = [False] * len(trials)

    def decided() -> dict[int, int]:
        return asha.stops(list(zip(seen, ended, strict=True)), rungs, reduction)

    def stops(number: int, step: int, loss: float) -> bool:
        seen[number][step] = loss
        ended[number] = step == total or number in decided()
        return ended[number]

    steps = replay(trials, stops)
    return Outcome(steps, sorted(decided()))


def replays(draws: list[list[Trial]], noise: float) -> list[dict]:
    """A row for each number of trials, first rung and reduction: both rules over all draws."""
    rows = []
    for number, grace, reduction in GRID:
        row = {"trials": number, "grace_period": grace, "reduction_factor": reduction}
        for name, rule in (("ours", with_our_rule), ("rays", with_rays_rule)):
            found = [(rule(trials[:number], grace, reduction), trials[:number]) for trials in draws]
            shares = [outcome.share(trials) for outcome, trials in found]
            missed = [outcome.missed(trials) for outcome, trials in found]
            row[name] = {
                "share": round(mean(shares), 4),
                "largest_share": round(max(shares), 4),
                "at_most_half": sum(share <= 0.5 for share in shares),
                "missed": round(mean(missed), 4),
                "most_missed": round(max(missed), 4),
                "best_found": sum(loss == 0 for loss in missed),
                "best_within_noise": sum(loss <= noise for loss in missed),
            }
        rows.append(row)
    return rows


def real_search(folder: Path, seed: int, trials: list[Trial]) -> dict:
    """A search with early stopping as smoke.yaml has it, next to its replay."""
    cfg = load_config(loop.Config, SMOKE, [])
    expected = with_our_rule(trials[: cfg.search.trials], cfg.search.grace_period, cfg.search.reduction_factor)
    search(folder, f"seed={seed}")
    summary = read_json(folder / "summary.json")["search"]
    steps = [read_metrics(path)[-1]["step"] for path in sorted((folder / "trials").glob("trial-*"))]
    return {
        "seed": seed,
        **{key: getattr(cfg.search, key) for key in ("trials", "grace_period", "reduction_factor")},
        "steps": steps,
        "replayed_steps": expected.steps,
        "best": summary["best"],
        "replayed_best": f"trial-{expected.best(trials[: cfg.search.trials]):03d}",
        "best_eval_loss": summary["best_eval_loss"],
        "default_eval_loss": summary["default_eval_loss"],
        "lowest_eval_loss": min(final(trial) for trial in trials[: cfg.search.trials]),
        "share": round(sum(steps) / sum(max(trial.losses) for trial in trials[: cfg.search.trials]), 4),
        **{name: summary[name] for name in ("device_seconds", "device_seconds_saved", "wall_seconds", "devices_busy")},
    }


def train_in_order(folder: Path, parameters: dict, seed: int, order: int) -> float:
    """The final held-out loss of a trial of draw `seed`, its weights and rows those of the draw, in another order."""
    torch.set_num_threads(1)
    cfg = load_config(loop.Config, SMOKE, [f"seed={seed}", "tracking.backend=none", "checkpoint.every=0"])
    weights = folder / "weights"  # of the draw's seed: from a name, they would be those of `order`
    if not (weights / "model.safetensors").exists():
        models.load_model(cfg.model, seed).save_pretrained(weights)
        models.load_tokenizer(cfg.model).save_pretrained(weights)
    tokenizer = models.load_tokenizer(cfg.model)
    rows, held_out = loop.build_dataloaders(cfg, tokenizer)
    own = str(folder / f"order-{order}")
    run = dataclasses.replace(cfg, model=ModelConfig(str(weights)), seed=order, output_dir=own)
    run.train = space.with_parameters(cfg, parameters)
    stop = SimpleNamespace(reason=None)
    for _ in loop.train(run, tokenizer, rows, held_out, stop, is_trial=True):
        pass
    return read_json(folder / f"order-{order}" / "summary.json")["eval_loss_after"]


def noise_of(folder: Path, seed: int, trials: list[Trial]) -> dict:
    best = min(trials, key=final)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "losses.json"
    if not kept.exists():
        same = train_in_order(folder, best.parameters, seed, seed)
        assert abs(same - final(best)) < 0.01, "in the draw's own order it is the draw's trial, but for rounding"
        with ProcessPoolExecutor(SLOTS, multiprocessing.get_context("spawn")) as pool:
            losses = [pool.submit(train_in_order, folder, best.parameters, seed, order) for order in ORDERS]
            kept.write_text(json.dumps([loss.result() for loss in losses]), encoding="utf-8")
    losses = json.loads(kept.read_text(encoding="utf-8"))
    deviation = round(stdev(losses), 4)
    return {"seed": seed, "parameters": best.parameters, "losses": losses, "standard_deviation": deviation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the searches are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, *range(1, 9)], help="the draws")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "results" / "ray-tune")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder, seeds = arguments.folder.resolve(), arguments.seeds

    draws = {}
    for name, settings in SPACES.items():
        place = folder / name.replace(" ", "-")
        whole = ["search.scheduler=none", f"search.trials={TRIALS}", *settings]
        draws[name] = [read_trials(search(place / f"seed-{seed}", *whole, f"seed={seed}")) for seed in seeds]
    shipped = draws["smoke.yaml"]
    noise = [noise_of(folder / f"noise-{seed}", seed, shipped[i]) for i, seed in enumerate(seeds[:NOISE_DRAWS])]
    # Two runs of one configuration differ by √2 standard deviations; twice that does not show a better configuration.
    within = 2 * 2**0.5 * mean(n["standard_deviation"] ** 2 for n in noise) ** 0.5
    real = [real_search(folder / f"asha-{seed}", seed, shipped[i]) for i, seed in enumerate(seeds[:REAL_DRAWS])]
    record = {
        "project": "ray-tune",
        "case": "early-stopping",
        "date": datetime.date.today().isoformat(),
        "machine": "CPU",
        "command": "python bench/early_stopping.py runs/early-stopping --seeds " + " ".join(map(str, seeds)),
        "environment": runtime.describe_environment(1, "fp32: the default on a CPU"),
        "seeds": seeds,
        "budget": max(shipped[0][0].losses),
        "noise": {"within": round(within, 4), "configurations": noise},
        "replays": {name: replays(trials, within) for name, trials in draws.items()},
        "searches": real,
        "draws": {
            name: [[{**t.parameters, "losses": [round(x, 4) for x in t.losses.values()]} for t in d] for d in drawn]
            for name, drawn in draws.items()
        },
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "early-stopping.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    for name, rows in record["replays"].items():
        for row in rows:
            print(name, row)
    print(f"within noise: {within:.4f}", *real, sep="\n")


if __name__ == "__main__":
    main()
