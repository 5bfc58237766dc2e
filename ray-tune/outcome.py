"""What a search leaves in addition to its trials' run folders: table, plots, summary, and the best trial's model."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import space
from trials import Record, Spans, Trials, ranking

from common.checkpoints import IDENTITY
from common.config import BaseConfig, get, save_config
from common.errors import UserError
from common.files import remove, write_json
from common.report import print_table, read_json

# With other values of these, it is another search.
SAME = (*IDENTITY, "data.train_rows", "data.eval_rows", "train.micro_batch_size", "train.max_steps", "train.epochs",
        "train.learning_rate", "train.warmup_steps", "train.lr_schedule", "train.max_grad_norm", "eval.every",
        "search.space", "search.trials", "search.algorithm", "search.scheduler", "search.grace_period",
        "search.reduction_factor", "search.gpus_per_trial")  # fmt: skip

PLACE = "the folder that it was begun in"


def begin(cfg: BaseConfig, root: Path, data_fingerprint: str) -> None:
    """A new search, or the one in the folder resumes. Raises `UserError` if that one was another."""
    if cfg.checkpoint.resume == "never":
        for name in ("trials", "tune", "checkpoints", "model", "plots", "identity.json", "spans.jsonl", "summary.json",
                     "eval.json", "samples.md", "metrics.jsonl"):  # fmt: skip
            remove(root / name)
    path = root / "identity.json"
    begun = read_json(path)
    ours = {name: get(cfg, name) for name in SAME} | {
        "the training data's fingerprint": data_fingerprint,
        PLACE: begun.get(PLACE, str(root)),
    }
    for name, theirs in begun.items():
        if name in ours and ours[name] != theirs:
            raise UserError(
                f"{name} is {ours[name]}, but the search in {root} was begun with {theirs}: set it back, choose "
                f"another output_dir, or set checkpoint.resume=never to start from scratch"
            )
    write_json(path, ours)
    save_config(cfg, root / "config.yaml")


def check_place(root: Path) -> None:
    """Raise `UserError` if an unfinished search was moved or copied: Ray's record of it names its first folder."""
    begun = read_json(root / "identity.json")[PLACE]
    if begun != str(root):
        raise UserError(
            f"output_dir={root}: this search was begun in {begun} and can be resumed only there: move it back, or set "
            f"checkpoint.resume=never to start from scratch"
        )


def final_run(cfg: BaseConfig, winner: Record) -> BaseConfig:
    """The settings of the run that ends the search: the best trial's, from its checkpoint, in the search's folder."""
    final = copy.deepcopy(cfg)
    final.train = space.with_parameters(cfg, winner.parameters)
    what = "it reached the full budget" if winner.status == "completed" else "it is trained on to the full budget"
    saved = sorted((winner.folder / "checkpoints").glob("step-*"))
    if any((Path(cfg.output_dir) / "checkpoints").glob("step-*")):
        final.checkpoint.resume = "auto"  # it had begun, and was stopped
    elif saved:
        final.checkpoint.resume = str(saved[-1])
    else:  # it gave way to another trial's, which only later turned out not to be the best
        final.checkpoint.resume = "never"
        what = "it is trained once more, for its checkpoint is gone"
    if winner.status == "completed":
        final.tracking.backend = "none"  # its curve is its trial's
    values = ", ".join(f"{name}={_short(value)}" for name, value in winner.parameters.items())
    print(f"\nBest: {winner.name} ({values}); {what}")
    return final


def finish(cfg: BaseConfig, trials: Trials, winner: Record) -> None:
    """The best trial's run is over: add the search's own figures to its own."""
    root = trials.root.parent
    save_config(cfg, root / "config.yaml")  # the search's; the best trial's lies in its folder
    summary = read_json(root / "summary.json")
    write_json(root / "summary.json", summary | {"search": figures(trials)})
    show(trials)


def interrupted(cfg: BaseConfig, project: str, trials: Trials, reason: str) -> None:
    """The search was asked to stop: what it found so far, and how to resume it."""
    how = "the same command" if cfg.checkpoint.resume == "auto" else "checkpoint.resume=auto"
    print(f"Stopped ({reason}); {how} resumes from here")
    _without_model(project, "interrupted", trials)


def all_failed(cfg: BaseConfig, project: str, trials: Trials) -> UserError:
    """No trial came to a result: the error to raise."""
    _without_model(project, "failed", trials)
    first = next(record for record in trials.read_all() if record.error)
    return UserError(
        f"all {cfg.search.trials} trials failed. {first.name}: {first.error}. To try again, set "
        f"checkpoint.resume=never as well"
    )


def _without_model(project: str, status: str, trials: Trials) -> None:
    search = figures(trials)
    write_json(
        trials.root.parent / "summary.json", {"project": project, "status": status, "steps": 0, "search": search}
    )
    show(trials)


def figures(trials: Trials) -> dict[str, Any]:
    """The search's part of `summary.json`."""
    records = trials.read_all()
    spent = sum(record.seconds for record in records)
    stopped = [record for record in records if record.status == "stopped" and record.steps]
    # What the rest of a stopped trial's budget would have taken at its own speed.
    saved = sum(r.seconds / r.steps * (trials.total_steps - r.steps) for r in stopped)
    ranked = [record for record in ranking(records) if record.curve and record.status != "failed"]
    default = next((record for record in records if record.number == 0), None)
    return {
        "trials": len(records),
        **{status: sum(r.status == status for r in records) for status in ("completed", "stopped", "failed")},
        "best": ranked[0].name if ranked else None,
        "best_parameters": ranked[0].parameters if ranked else None,
        "best_eval_loss": ranked[0].last[1] if ranked else None,
        "best_steps": ranked[0].last[0] if ranked else None,
        "default_eval_loss": default.last[1] if default and default.curve else None,
        "default_steps": default.last[0] if default and default.curve else None,
        "device_seconds": round(spent, 1),
        "device_seconds_saved": round(saved, 1),
        **Spans(trials.root.parent / "spans.jsonl").busy(),
    }


def show(trials: Trials) -> None:
    """`trials.csv`, the table, the plots, and one line on what early stopping saved."""
    root = trials.root.parent
    records = trials.read_all()
    names = list(dict.fromkeys(name for record in records for name in record.parameters))
    heading = ["trial", *names, "status", "steps", "held-out loss", "seconds"]
    rows = [
        [
            record.name,
            *(record.parameters.get(name, "") for name in names),
            record.status or "unfinished",
            record.last[0],
            record.last[1] if record.curve else "",
            round(record.seconds, 1),
        ]
        for record in ranking(records)
    ]
    with (root / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heading, *rows])
    import plots  # here: it imports matplotlib, and every trial imports this module

    plots.draw(records, trials, root / "plots")
    print()
    print_table([heading, *([*map(_short, values), f"{seconds:,.1f}"] for *values, seconds in rows)])
    search = read_json(root / "summary.json")["search"]
    if search["completed"] or search["stopped"]:
        total = search["device_seconds"] + search["device_seconds_saved"]
        print(
            f"\nstopped early: {search['stopped']} of {search['trials']}; device seconds: "
            f"{search['device_seconds']:,.0f} spent, about {search['device_seconds_saved']:,.0f} of {total:,.0f} saved"
        )
    made = ("trials", "trials.csv", "plots/search.png", "plots/search_parameters.png")
    print(f"\nin {root}:\n  {'  '.join(name for name in made if (root / name).exists())}")


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if value < 1 else f"{value:,.4f}"
