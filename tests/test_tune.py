"""ray-tune by its real launcher: the search and what it leaves, ASHA's decisions, stop, kill and resume, failures."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import REPOSITORY, refused
from launching import (
    PYTHON,
    another_job_with_a_gpu,
    assert_close,
    environment,
    error_line,
    losses,
    metrics,
    project_modules,
    ray_nodes,
    run,
    start,
)
from transformers import AutoModelForCausalLM
from wandb_log import history, read_wandb

from common import data, models
from common.config import load_config

PROJECT = "ray-tune"
# smoke.yaml with fewer trials, a fifth of its steps and half its length. Which trials are stopped, and what that saves,
# depends on the seed alone.
ROWS = ["data.eval_rows=16", "data.max_length=64"]
SEARCH = [
    *ROWS,
    "train.max_steps=90",
    "train.warmup_steps=5",
    "search.space.warmup_steps.choice=[0,5]",
    "search.trials=6",
    "search.grace_period=10",
    "search.reduction_factor=3",
    "eval.every=10",
    "checkpoint.every=10",
]
HALF_A_GPU = "search.gpus_per_trial=0.5"  # two trials at a time in the cluster `one_gpu`, as on two CPU slots
QUICK = [*ROWS, "data.train_rows=400", "tracking.backend=none", "train.max_steps=12", "train.warmup_steps=0",
         "search.grace_period=4", "eval.every=4"]  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    with project_modules(PROJECT, "asha", "space", "trials", "outcome", "cluster", "trial", "train") as found:
        yield found


def table(run_dir: Path) -> list[dict]:
    """trials.csv without the seconds, which differ from run to run."""
    with (run_dir / "trials.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def trial(run_dir: Path, number: int) -> Path:
    return run_dir / "trials" / f"trial-{number:03d}"


def held_out(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["eval_loss"] for record in metrics(run_dir) if "eval_loss" in record}


def checkpoints(run_dir: Path) -> list[str]:
    return [p.parent.parent.name for p in (run_dir / "trials").glob("trial-*/checkpoints/step-*")]


def ray_processes(run_dir: Path) -> list[psutil.Process]:
    """What Ray started for the search in `run_dir`, the trials too: they have its folder in their command lines."""
    try:
        folder = (run_dir / "ray-folder").read_text()
    except FileNotFoundError:
        return []
    return _with_folder(folder)


def _with_folder(folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("RAY_SESSION_DIR", "")]
        except psutil.Error:
            continue
        if any(folder in word for word in words) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def most_at_a_time(run_dir: Path) -> tuple[int, int]:
    """How many devices the search knew, and the most trials that held one at a time."""
    events = [json.loads(line) for line in (run_dir / "spans.jsonl").read_text().splitlines()]
    changes = [{"start": 1, "end": -1}.get(event["event"], 0) for event in events]
    return events[0]["devices"], max(sum(changes[:i]) for i in range(1, len(changes) + 1))


def wait_until(process: subprocess.Popen, path: Path, text: str) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{text} did not come")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The search that the interrupted ones must equal; its output, and the most checkpoints that it had at a time."""
    folder = tmp_path_factory.mktemp("tune") / "search"
    counts, done = [], threading.Event()

    def count() -> None:
        while not done.wait(0.05):
            if len(found := checkpoints(folder)) > len(set(found)):
                continue  # a trial has just written its new one and drops the old
            counts.append(len(found))

    looking = threading.Thread(target=count)
    looking.start()
    output = run(PROJECT, *SEARCH, f"output_dir={folder}")
    done.set()
    looking.join()
    return folder, output, max(counts)


@pytest.mark.slow
def test_a_search_beats_the_default_and_leaves_table_plots_and_model(whole, modules):
    folder, output, most_checkpoints = whole
    summary = json.loads((folder / "summary.json").read_text())
    found = summary["search"]
    assert summary["status"] == "completed" and summary["steps"] == 90
    assert found["trials"] == 6 and found["completed"] + found["stopped"] == 6 and found["stopped"] >= 3
    assert found["default_steps"] == found["best_steps"] == 90
    assert found["best_eval_loss"] < found["default_eval_loss"] - 0.05
    assert summary["eval_loss_after"] == pytest.approx(found["best_eval_loss"], rel=1e-12)
    assert 0.3 < found["devices_busy"] <= 1 and found["device_seconds_saved"] > 0

    rows = table(folder)
    assert len(rows) == 6 and rows[0]["trial"] == found["best"]
    default = next(row for row in rows if row["trial"] == "trial-000")
    assert float(default["learning_rate"]) == 1e-3 and default["micro_batch_size"] == "8"
    for row in rows:
        assert 3e-4 <= float(row["learning_rate"]) <= 2e-2 and int(row["micro_batch_size"]) in (2, 4, 8)
        assert 0 <= float(row["weight_decay"]) <= 0.3 and int(row["warmup_steps"]) in (0, 5)
        assert row["trial"] in output
    # What stopping early saves, in optimizer steps: those of the same trials without it would be 6 × 90.
    assert sum(int(row["steps"]) for row in rows) <= 0.6 * 6 * 90
    for plot in ("search", "search_parameters", "loss"):
        assert (folder / f"plots/{plot}.png").stat().st_size > 10_000
    assert most_checkpoints <= 3  # two running trials, and the best of those that ended
    assert checkpoints(folder) == [found["best"]]
    assert "stopped early" in output and "Traceback" not in output and "WARNING" not in output
    assert "it reached the full budget" in output
    assert "This run is complete" not in output and "train.max_steps" not in output  # it is not the user's to train on
    lines = re.findall(r"^trial-\d+ +step +(\d+) of 90 ", output, re.MULTILINE)
    assert set(lines) == {"10", "30", "90"}  # one at each rung and at the end: most evaluations decide nothing
    assert "Searching: 100%" in output and "Training:" not in output  # of a best trial that was complete already

    # ASHA's decisions are those of the rule, from the trials' own files.
    curves = [({k: v for k, v in held_out(trial(folder, n)).items() if k}, True) for n in range(6)]
    stopped = modules["asha"].stops(curves, [10, 30], 3)
    expected = {f"trial-{n:03d}": stopped.get(n, 90) for n in range(6)}
    assert {row["trial"]: int(row["steps"]) for row in rows} == expected


@pytest.mark.slow
def test_the_best_trials_model_is_exported_and_evaluated(whole):
    folder, _, _ = whole
    best = json.loads((folder / "summary.json").read_text())["search"]["best"]
    state = torch.load(folder / "trials" / best / "checkpoints/step-00000090/training.pt", weights_only=True)["model"]
    exported = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert torch.equal(exported["model.embed_tokens.weight"], state["model.model.embed_tokens.weight"])
    assert {k.removeprefix("model."): v.shape for k, v in state.items()} == {k: v.shape for k, v in exported.items()}
    done = subprocess.run(
        [PYTHON, f"{PROJECT}/eval.py", "--config", "smoke.yaml", *ROWS, f"output_dir={folder}",
         "eval.generate_rows=2", "eval.samples=1", "eval.max_new_tokens=4"],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "eval.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert figures["fine_tuned"]["loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-9)
    assert figures["base"]["loss"] == pytest.approx(summary["eval_loss_before"], rel=1e-9)


@pytest.mark.slow
def test_every_trial_is_a_run_of_one_group_in_the_tracker(whole):
    folder, _, _ = whole
    for number in range(6):
        (file,) = trial(folder, number).glob("wandb/offline-run-*/run-*.wandb")
        records = read_wandb(file)
        (begun, *_) = [record.run for record in records if record.HasField("run")]
        assert begun.run_group == "search" and begun.display_name == f"trial-{number:03d}"
        logged = {step: row["loss"] for step, row in history(records).items() if "loss" in row}
        assert list(logged.values()) == [loss for loss, _ in losses(trial(folder, number))]
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]  # also of stopped ones
    assert not (folder / "wandb").exists()  # the best one's curve is its trial's


@pytest.mark.slow
def test_a_trial_is_a_run_of_pytorch_ddp(whole, tmp_path):
    folder, _, _ = whole
    settings = [*ROWS, "train.max_steps=90", "train.warmup_steps=5", "train.global_batch_size=8",
                "train.micro_batch_size=8", "train.learning_rate=1e-3", "tracking.backend=none", "eval.every=10",
                "checkpoint.every=0", f"output_dir={tmp_path}"]  # fmt: skip
    run("pytorch-ddp", *settings, processes=1)
    assert_close(losses(trial(folder, 0)), losses(tmp_path), 1e-5)
    ours, theirs = held_out(trial(folder, 0)), held_out(tmp_path)
    assert ours.keys() == theirs.keys() and list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-5)


@pytest.mark.slow
def test_a_search_that_was_stopped_and_then_killed_comes_to_the_same_end(whole, tmp_path):
    expected, _, _ = whole
    folder = tmp_path / "search"
    process = start(PROJECT, *SEARCH, f"output_dir={folder}", cold=True)
    wait_until(process, trial(folder, 1) / "metrics.jsonl", '"step": 4,')  # before the first rung: both continue
    ray_folder = (folder / "ray-folder").read_text()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and "Stopped (SIGTERM)" in output and "Traceback" not in output, output
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert not _with_folder(ray_folder) and not Path(ray_folder).exists()
    for number in (0, 1):  # each has saved where it was, and says so
        summary = json.loads((trial(folder, number) / "summary.json").read_text())
        assert summary["status"] == "interrupted"
        assert (trial(folder, number) / f"checkpoints/step-{summary['steps']:08d}").is_dir()
        assert not (trial(folder, number) / "ended.json").exists()

    process = start(PROJECT, *SEARCH, f"output_dir={folder}", cold=True)
    wait_until(process, trial(folder, 3) / "metrics.jsonl", '"step": 3,')
    ray_folder = (folder / "ray-folder").read_text()
    process.kill()  # the search alone: what Ray started has to end by itself
    process.communicate()
    deadline = time.monotonic() + 60
    while (left := _with_folder(ray_folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left
    ended = {p.parent.name: (p.parent / "metrics.jsonl").read_text() for p in folder.glob("trials/*/ended.json")}
    assert len(ended) >= 2
    before = {p.parent.name: losses(p.parent) for p in folder.glob("trials/*/metrics.jsonl")}

    output = run(PROJECT, *SEARCH, f"output_dir={folder}")
    assert f"Resuming the search: {len(ended)} of 6 trials have ended" in output
    for name, text in ended.items():  # with the seconds that each step took: nothing was repeated
        assert (folder / "trials" / name / "metrics.jsonl").read_text() == text
    assert not Path(ray_folder).exists()
    assert table(folder) == table(expected)
    for number in range(6):  # to the last bit, as far as both went
        ours, theirs = losses(trial(folder, number)), losses(trial(expected, number))
        both = min(len(ours), len(theirs))
        assert both >= 10 and ours[:both] == theirs[:both]
    assert before["trial-001"] == losses(trial(expected, 1))[: len(before["trial-001"])]
    weights = [AutoModelForCausalLM.from_pretrained(f / "model").state_dict() for f in (folder, expected)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_search_stops_when_its_hours_are_over_and_goes_on_by_the_same_command(whole, tmp_path):
    expected, _, _ = whole
    # A third of what the whole search took from its first trial on: before that, data are read and Ray is started.
    seconds = json.loads((expected / "summary.json").read_text())["search"]["wall_seconds"] / 3
    settings = [*SEARCH, "tracking.backend=none", f"output_dir={tmp_path}"]
    hours = f"runtime.max_hours={round(seconds / 3600, 6)}"  # as it is said again: without a last zero
    output = run(PROJECT, *settings, hours)
    assert f"Stopped ({hours} is over); the same command resumes from here" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["search"]["completed"] < 6
    begun = [
        path.parent for path in tmp_path.glob("trials/*/metrics.jsonl") if not (path.parent / "ended.json").exists()
    ]
    for folder in begun:
        saved = json.loads((folder / "summary.json").read_text())
        assert saved["status"] == "interrupted" and (folder / f"checkpoints/step-{saved['steps']:08d}").is_dir()
    run(PROJECT, *settings, "runtime.max_hours=3")
    assert table(tmp_path) == table(expected)
    assert {f.name: losses(f)[:10] for f in begun} == {f.name: losses(expected / "trials" / f.name)[:10] for f in begun}


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory):
    """A cluster that is there already, with a GPU for Ray to hand out: PyTorch sees none, so trials use the CPU."""
    with ray_nodes(tmp_path_factory.mktemp("home"), ["--num-cpus=4", "--num-gpus=1"]) as variables:
        yield variables


@pytest.mark.slow
def test_two_trials_share_a_gpu_of_a_cluster_that_is_there(whole, one_gpu, tmp_path):
    settings = [*SEARCH, "tracking.backend=none", HALF_A_GPU, f"output_dir={tmp_path}/search"]
    run(PROJECT, *settings, **one_gpu)
    assert table(tmp_path / "search") == table(whole[0])
    assert most_at_a_time(tmp_path / "search") == (2, 2)
    assert not (tmp_path / "search/ray-folder").exists()


@pytest.mark.slow
def test_a_search_waits_for_a_gpu_that_another_job_holds_and_takes_no_more_than_it_may(one_gpu, untied, tmp_path):
    """With a local model by a relative path, and four trials for which the GPU would have room, two of them at most."""
    settings = [*QUICK, "search.space.warmup_steps.choice=[0,4]", f"model.name={os.path.relpath(untied, REPOSITORY)}",
                "search.algorithm=optuna", "search.trials=3", "search.gpus_per_trial=0.25",
                "search.concurrent_trials=2"]  # fmt: skip
    with another_job_with_a_gpu(one_gpu):
        process = start(PROJECT, *settings, f"output_dir={tmp_path}/search", **one_gpu)
        seen = ""
        while "Waiting: the cluster has started no trial yet" not in seen:
            line = process.stdout.readline()
            assert line, seen
            seen += line
        assert not (tmp_path / "search/trials").exists()
    output = seen + process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert sorted(row["trial"] for row in table(tmp_path / "search")) == [f"trial-{n:03d}" for n in range(3)]
    assert most_at_a_time(tmp_path / "search") == (2, 2)


@pytest.mark.slow
def test_a_complete_search_says_so_and_one_whose_best_trial_was_stopped_trains_it_on(whole, tmp_path):
    folder = tmp_path / "search"
    shutil.copytree(whole[0], folder)
    rows = table(folder)
    finished = [row["trial"] for row in rows if row["status"] == "completed"]
    for name in finished:  # as if they had failed in their last steps
        (folder / "trials" / name / "ended.json").write_text('{"status": "failed", "error": "out of memory"}')
        lines = (folder / "trials" / name / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "trials" / name / "metrics.jsonl").write_text("".join(x for x in lines if '"step": 90,' not in x))
    stopped = next(row for row in rows if row["status"] == "stopped")  # the table is in order
    output = run(PROJECT, *SEARCH, "tracking.backend=none", f"output_dir={folder}")
    assert f"Best: {stopped['trial']}" in output and "trained once more, for its checkpoint is gone" in output
    curve = held_out(folder)
    assert max(curve) == 90 and curve[int(stopped["steps"])] == float(stopped["held-out loss"])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["search"]["failed"] == len(finished)
    assert summary["eval_loss_after"] == curve[90]


@pytest.mark.slow
def test_without_early_stopping_the_trials_are_the_same(whole, one_gpu, modules, tmp_path):
    settings = ["tracking.backend=none", "search.scheduler=none", HALF_A_GPU, f"output_dir={tmp_path}"]
    run(PROJECT, *SEARCH, *settings, **one_gpu)
    rows, early = table(tmp_path), table(whole[0])
    assert [row["status"] for row in rows] == ["completed"] * 6
    for number in range(6):
        both = min(len(losses(trial(folder, number))) for folder in (tmp_path, whole[0]))
        assert losses(trial(tmp_path, number))[:both] == losses(trial(whole[0], number))[:both]
    # From the whole curves, all known at once, the rule stops the trials that ASHA stopped while they ran.
    curves = [({k: v for k, v in held_out(trial(tmp_path, n)).items() if k}, True) for n in range(6)]
    stopped = modules["asha"].stops(curves, [10, 30], 3)
    assert {row["trial"]: int(row["steps"]) for row in early if row["status"] == "stopped"} == {
        f"trial-{number:03d}": step for number, step in stopped.items()
    }
    # The best of those that were not stopped, and at most little worse than the best of all.
    best = next(row for row in rows if row["trial"] not in {f"trial-{n:03d}" for n in stopped})
    assert {**best, "status": ""} == {**early[0], "status": ""}
    default = float(next(row for row in rows if row["trial"] == "trial-000")["held-out loss"])
    gained, possible = (default - float(found["held-out loss"]) for found in (early[0], rows[0]))
    assert 0.4 < gained / possible <= 1


@pytest.mark.slow
def test_a_trial_that_fails_is_reported_and_the_search_goes_on(one_gpu, tmp_path):
    """With Optuna, and learning rates at some of which the loss is not a number after a step or two."""
    text = (REPOSITORY / PROJECT / "smoke.yaml").read_text().split("  space:")
    rest = text[1].partition("eval:")[2]

    def config(values: str) -> str:
        path = tmp_path / f"{len(values)}.yaml"
        path.write_text(f"{text[0]}  space: {{learning_rate: {{choice: {values}}}}}\neval:{rest}")
        return str(path)

    some, every = config("[1.0e-3, 1.0e+30]"), config("[1.0e+30]")
    settings = ["search.trials=4", "search.algorithm=optuna", f"output_dir={tmp_path}/some"]
    # A tracker that fails in a trial's process is the user's to know.
    output = run(PROJECT, *QUICK, *settings, "tracking.backend=wandb", config=some, WANDB_MODE="nonsense")
    for number in range(4):
        assert f"trial-{number:03d}  warning: tracking.backend=wandb is off from here on" in output
    rows = table(tmp_path / "some")
    assert sorted(row["trial"] for row in rows) == [f"trial-{n:03d}" for n in range(4)]
    failed = [row for row in rows if row["status"] == "failed"]
    assert 1 <= len(failed) <= 3 and rows[0]["status"] == "completed", rows
    assert all(float(row["learning_rate"]) == 1e30 for row in failed)
    assert f"{failed[0]['trial']}  failed: the loss of step" in output and "Traceback" not in output
    assert json.loads((tmp_path / "some/summary.json").read_text())["search"]["failed"] == len(failed)

    settings = ["search.trials=2", "train.learning_rate=1.0e+30", HALF_A_GPU, f"output_dir={tmp_path}/all"]
    line = error_line(run(PROJECT, *QUICK, *settings, config=every, exit_code=2, **one_gpu))
    assert "all 2 trials failed. trial-000: the loss of step" in line and "checkpoint.resume=never" in line
    assert json.loads((tmp_path / "all/summary.json").read_text())["status"] == "failed"
    assert not (tmp_path / "all/model").exists() and not checkpoints(tmp_path / "all")


class StopAt:
    """A request to stop that comes while the run in `folder` makes optimizer step `step`."""

    def __init__(self, folder: Path, step: int):
        self.folder, self.step = folder, step

    @property
    def reason(self) -> str | None:
        return "asked to" if metrics(self.folder)[-1]["step"] == self.step else None


def test_a_trial_that_stops_at_an_evaluation_has_its_loss_when_it_goes_on(modules, tmp_path):
    """Else a rung at that step would compare a later loss, and the search would have another outcome."""
    loop = modules["trial"]
    cfg = load_config(loop.Config, REPOSITORY / PROJECT / "smoke.yaml", QUICK)
    tokenizer = models.load_tokenizer(cfg.model)
    rows, held_out_batches = loop.build_dataloaders(cfg, tokenizer)

    def held_out_losses(folder: Path, stop_at: int = 0) -> dict[int, float]:
        cfg.output_dir = str(folder)
        for _ in loop.train(cfg, tokenizer, rows, held_out_batches, StopAt(folder, stop_at), True):
            pass
        return held_out(folder)

    undisturbed = held_out_losses(tmp_path / "whole")
    assert list(undisturbed) == [0, 4, 8, 12]
    assert held_out_losses(tmp_path / "stopped", stop_at=8) == {step: undisturbed[step] for step in (0, 4, 8)}
    assert held_out_losses(tmp_path / "stopped") == undisturbed


def curve(*values: float) -> dict[int, float]:
    return {10 * (i + 1): value for i, value in enumerate(values)}


def test_asha_compares_with_earlier_trials_whenever_they_report(modules):
    stops, rungs = modules["asha"].stops, modules["asha"].rungs
    assert rungs(10, 3, 270) == [10, 30, 90] and rungs(10, 3, 90) == [10, 30]
    # The first trial is never stopped; the second is worse at the first rung; the third is better and continues.
    assert stops([(curve(5, 4, 3), True), (curve(6), True), (curve(4, 3, 2), True)], [10, 30], 3) == {1: 10}
    # Of three losses at a rung, the best third continues: 4.5 is above the 33rd percentile of 4 and 5.
    assert stops([(curve(4), True), (curve(4), True), (curve(4.5), True)], [10], 3) == {2: 10}
    # Of 1, 2, 3 and 4 the best third ends at 2: a loss of 2.5 is among the better half, and not good enough.
    five = [(curve(loss), True) for loss in (1, 2, 3, 4, 2.5)]
    assert stops(five, [10], 3) == {1: 10, 2: 10, 3: 10, 4: 10}
    # Not decided before the earlier trial is at the rung, or has ended without coming there.
    assert stops([({}, False), (curve(9), False)], [10], 3) == {}
    assert stops([({}, True), (curve(9), False)], [10], 3) == {}
    assert stops([(curve(5), False), (curve(9), False)], [10], 3) == {1: 10}
    # It may have gone on by then: only its losses up to the rung count, and a third one waits for its fate as well.
    late = [(curve(5), False), (curve(4, 4, 4, 4), True), (curve(3, 3, 3), False)]
    assert stops(late, [10, 30], 3) == {}
    assert stops([(curve(5, 5, 1), True), *late[1:]], [10, 30], 3) == {1: 30, 2: 30}
    # A rung between two evaluations: the next one counts.
    assert stops([({10: 5.0, 20: 4.0}, True), ({10: 4.0, 20: 4.5}, True)], [15], 3) == {1: 20}


def test_ashas_decisions_do_not_depend_on_the_order_of_the_reports(modules):
    """Any order in which the same reports arrive leads to the same trials stopped at the same steps."""
    stops = modules["asha"].stops
    generator = torch.Generator().manual_seed(1)
    finals = [curve(*torch.rand(9, generator=generator).tolist()) for _ in range(6)]
    expected = stops([(c, True) for c in finals], [10, 30], 3)
    assert expected
    for _ in range(20):
        seen = [({}, False) for _ in finals]
        decided: dict[int, int] = {}
        while not all(ended for _, ended in seen):
            open_trials = [n for n, (_, ended) in enumerate(seen) if not ended]
            number = open_trials[int(torch.randint(len(open_trials), (1,), generator=generator))]
            have = dict(list(finals[number].items())[: len(seen[number][0]) + 1])
            seen[number] = (have, len(have) == len(finals[number]))
            now = stops(seen, [10, 30], 3)
            assert decided.items() <= now.items()  # a decision is never taken back
            decided = now
        assert decided == expected


@pytest.mark.parametrize(
    ("last_rung", "status"), [(40, "stopped"), (50, "stopped"), (54, "completed"), (59, "completed")]
)
def test_a_full_budget_is_completed_wherever_the_last_rung_lies(modules, tmp_path, last_rung, status):
    """Evaluations are every ten steps of sixty: the first one at or after the last rung may be the last of all."""
    trials = modules["trials"].Trials(tmp_path, 60, [20, last_rung], 3)
    for number, loss in enumerate((2.0, 3.0)):  # the second one is worse at the last rung only
        folder = tmp_path / f"trial-{number:03d}"
        folder.mkdir()
        steps = [step for step in range(10, 70, 10) if number == 0 or status == "completed" or step <= last_rung]
        (folder / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"step": s, "loss": 2.0, "seconds": s, "eval_loss": loss if s >= last_rung else 2.0}) + "\n"
                for s in steps
            )
        )
        trials.end(folder.name, "completed")
    first, second = trials.read_all()
    assert first.status == "completed" and second.status == status
    assert second.last == ((60, 3.0) if status == "completed" else (last_rung, 3.0))
    (tmp_path / "summary.json").write_text("{}")
    assert modules["outcome"].figures(trials)["completed"] == 1 + (status == "completed")


def test_best_is_the_furthest_and_then_the_lowest(modules, tmp_path):
    Record, best = modules["trials"].Record, modules["trials"].best
    records = [
        Record("trial-000", 0, tmp_path, status="completed", curve=curve(5, 4, 3)),
        Record("trial-001", 1, tmp_path, status="stopped", curve=curve(2)),  # lower, but at another step
        Record("trial-002", 2, tmp_path, status="completed", curve=curve(5, 4, 2.5)),
        Record("trial-003", 3, tmp_path, status="failed", curve=curve(5, 4, 1, 1)),
        Record("trial-004", 4, tmp_path, status="", curve=curve(1, 1, 1)),
    ]
    assert best(records).name == "trial-002"
    assert best(records[3:]) is None


def test_rows_of_a_sorted_data_set_are_drawn_from_all_of_it(modules, tmp_path):
    file = tmp_path / "imdb.jsonl"  # as IMDB is: all of one label, then all of the other
    file.write_text("".join(json.dumps({"text": f"Review {i}.", "label": i // 1000}) + "\n" for i in range(2000)))
    settings = [f"data.name={file}", "data.train_rows=400", "data.eval_rows=200", "data.eval_split="]
    cfg = load_config(modules["train"].Config, REPOSITORY / PROJECT / "config.yaml", settings)
    for part in data.load_rows(cfg.data, cfg.seed):
        labels = [int(text.removeprefix("Review ").removesuffix(".")) // 1000 for text in part["text"]]
        assert 0.4 < sum(labels) / len(part) < 0.6


def test_the_micro_batch_does_not_change_the_training(modules):
    """What the README says of searching it: the same losses but for rounding."""
    loop = modules["trial"]
    found = []
    for micro_batch in (2, 8):
        cfg = load_config(
            loop.Config, REPOSITORY / PROJECT / "smoke.yaml", [*QUICK, f"train.micro_batch_size={micro_batch}"]
        )
        tokenizer = models.load_tokenizer(cfg.model)
        rows = data.tokenize(data.load_rows(cfg.data, cfg.seed)[0], cfg.data, tokenizer)
        model = loop.build_model(cfg, torch.device("cpu"), torch.float32)
        optimizer = torch.optim.AdamW(models.parameter_groups(model, 0.1), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        batches = data.step_loader(rows, cfg, tokenizer.pad_token_id, 0, 1)
        found.append(
            [loop.train_step(model, batch, optimizer, scaler, cfg, torch.device("cpu"))[:2] for batch in batches]
        )
    assert_close(found[0], found[1], 1e-5)


SPACE = "search.space="
MISTAKES = {
    "empty space": ([], "search:\n  space: {}\n", ["search.space is empty"]),
    "unknown key": (["search.space={learning_rat: {choice: [1]}}"], "", ["search.space.learning_rat", "learning_rate"]),
    "epochs": (["search.space={epochs: {choice: [1, 2]}}"], "", ["search.space.epochs", "train.epochs"]),
    "no kind": (["search.space={weight_decay: [0, 1]}"], "", ["search.space.weight_decay", "uniform"]),
    "upside down": (
        ["search.space={weight_decay: {uniform: [0.3, 0.1]}}"], "", ["search.space.weight_decay.uniform", "below"],
    ),
    "log of zero": (
        ["search.space={learning_rate: {log_uniform: [0, 0.1]}}"], "", ["search.space.learning_rate", "above 0"],
    ),
    "fractions": (["search.space={warmup_steps: {uniform: [0, 9]}}"], "", ["search.space.warmup_steps", "choice"]),
    "endless": (["search.space={weight_decay: {uniform: [0, .inf]}}"], "", ["search.space.weight_decay", "inf"]),
    "too small": (["search.space={weight_decay: {uniform: [-1, 1]}}"], "", ["search.space.weight_decay", "least is 0"]),
    "not a number": (["search.space={weight_decay: {choice: [much]}}"], "", ["weight_decay", "'much' is not a float"]),
    "micro-batch": (["search.space={micro_batch_size: {choice: [8, 3]}}"], "", ["micro_batch_size: 3 does not divide"]),
    "default outside": (
        ["search.space={learning_rate: {choice: [0.5]}}"], "", ["train.learning_rate=0.001", "first trial"],
    ),
    "grace period": (["search.grace_period=500"], "", ["search.grace_period=500", "450"]),
    "no evaluations": (["eval.every=0"], "", ["eval.every=0", "search.grace_period"]),
    "warm-up": (["search.space={warmup_steps: {choice: [20, 500]}}"], "", ["500 warm-up steps", "450"]),
    "GPUs": (["search.gpus_per_trial=4"], "", ["search.gpus_per_trial=4", "GPUs"]),
    "resume": (["checkpoint.resume=runs/other"], "", ["checkpoint.resume=runs/other", "never"]),
    "global batch": (["train.global_batch_size=9"], "", ["9"]),
    "output folder": (["output_dir=/proc/nowhere"], "", ["output_dir=/proc/nowhere"]),
    "another choice": (["search.scheduler=ashas"], "", ["search.scheduler=ashas", "asha"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_anything_is_loaded(modules, monkeypatch, tmp_path, mistake):
    settings, file, words = MISTAKES[mistake]
    path = REPOSITORY / PROJECT / "smoke.yaml"
    if file:
        path = tmp_path / "mine.yaml"
        path.write_text(file)
    monkeypatch.setattr(models, "load_tokenizer", lambda *_: pytest.fail("the model was loaded"))
    with refused(*words):
        # A whole mapping on the command line is merged into the file's: only the key in question counts here.
        cfg = load_config(
            modules["train"].Config,
            path,
            [f"output_dir={tmp_path}/run", *(x for x in settings if not x.startswith(SPACE))],
        )
        for setting in settings:
            if setting.startswith(SPACE):
                import yaml

                cfg.search.space = yaml.safe_load(setting.removeprefix(SPACE))
        modules["train"].search(cfg)
    assert not (tmp_path / "run/trials").exists()


def test_what_a_cluster_cannot_give_is_refused(modules, monkeypatch, tmp_path):
    cluster, train = modules["cluster"], modules["train"]

    def config(*settings: str):
        return load_config(train.Config, REPOSITORY / PROJECT / "smoke.yaml", [f"output_dir={tmp_path}/run", *settings])

    def place(gpus: int, cpus: int, *settings: str) -> tuple[int, float]:
        return cluster.place(config(*settings), {"CPU": float(cpus), "GPU": float(gpus)})

    assert place(2, 2) == (2, 1.0) and place(0, 2) == (2, 0.0)
    assert place(2, 2, "search.gpus_per_trial=0.3") == (6, 0.3)  # three fit one GPU, a fourth would lie on two
    assert place(2, 2, "search.gpus_per_trial=0.5", "search.concurrent_trials=3") == (3, 0.5)
    assert place(0, 2, "search.concurrent_trials=5") == (5, 0.0)
    with refused("search.gpus_per_trial=3", "this machine has 2 GPUs"):
        place(2, 2, "search.gpus_per_trial=3")
    with refused("search.gpus_per_trial=2", "one GPU", "fraction"):
        place(2, 2, "search.gpus_per_trial=2")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert place(0, 7) == (7, 0.0) and place(0, 7, "search.concurrent_trials=9") == (7, 0.0)
    with refused("search.gpus_per_trial=2", "the cluster has 1 GPUs"):
        place(1, 7, "search.gpus_per_trial=2")
    monkeypatch.setattr(models, "load_tokenizer", lambda *_: pytest.fail("the model was loaded"))
    with refused("RAY_ADDRESS=127.0.0.1:1", "no cluster answers", "ray start"):
        train.search(config())
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    with refused("RAY_ADDRESS=ray://10.0.0.1:10001", "HOST:6379"):
        train.search(config())


def test_a_machine_that_does_not_see_the_searchs_folder_says_so(modules, tmp_path):
    trials, trial = modules["trials"].Trials(tmp_path / "elsewhere/trials", 9, [], 3), modules["train"].Trial
    with refused(f"output_dir={tmp_path}/elsewhere", "all machines must share it"):
        trial.setup(object.__new__(trial), {}, None, trials, None, None, None)
    assert not (tmp_path / "elsewhere").exists()


def test_another_search_in_the_same_folder_is_refused(modules, tmp_path):
    begin = modules["outcome"].begin
    config = modules["train"].Config, REPOSITORY / PROJECT / "smoke.yaml"
    cfg = load_config(*config, [f"output_dir={tmp_path}"])
    begin(cfg, tmp_path, "abc")
    begin(load_config(*config, [f"output_dir={tmp_path}", "runtime.max_hours=3"]), tmp_path, "abc")
    for setting, key in (("search.trials=7", "search.trials"), ("seed=1", "seed"), ("train.max_steps=9", "max_steps")):
        with refused(key, "checkpoint.resume=never"):
            begin(load_config(*config, [f"output_dir={tmp_path}", setting]), tmp_path, "abc")
    with refused("training data", "checkpoint.resume=never"):
        begin(cfg, tmp_path, "other")
    begin(load_config(*config, [f"output_dir={tmp_path}", "seed=1", "checkpoint.resume=never"]), tmp_path, "abc")
    modules["outcome"].check_place(tmp_path)
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    begin(load_config(*config, [f"output_dir={moved}", "seed=1"]), moved, "abc")  # of use, if no trial has to continue
    with refused(f"output_dir={moved}", f"begun in {tmp_path}", "move it back"):
        modules["outcome"].check_place(moved)


@pytest.mark.slow
def test_two_searches_in_one_folder_at_a_time_are_refused(modules, tmp_path):
    with modules["trials"].lock(tmp_path / ".lock", 0, ""):
        line = error_line(run(PROJECT, f"output_dir={tmp_path}", exit_code=2, cold=True))
        assert "another search is running in it" in line
