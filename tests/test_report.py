"""What a run folder holds: metrics that survive a kill, plots that show the data, tables that carry the figures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from common import plots, report
from common.errors import UserError
from tools import compare

REPOSITORY = Path(__file__).resolve().parent.parent


def write_run(folder: Path, project: str = "pytorch-ddp", gpu: float = 9.1, speed: float = 20_000) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": 0, "eval_loss": 3.5}]
    for step in range(1, 61):
        lines.append(
            {"step": step, "epoch": step / 60, "loss": 2 + 1.4 * math.exp(-step / 20) + 0.1 * (-1) ** step,
             "learning_rate": 2e-5 * min(1, step / 10), "grad_norm": 1.0, "tokens": step * 8192,
             "tokens_per_second": speed + 100 * (step % 7), "step_seconds": 0.4,
             "peak_gpu_gib": gpu, "peak_host_gib": 3.2}
        )  # fmt: skip
    lines.append({"step": 60, "eval_loss": 2.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"project": project, "status": "completed", "steps": 60, "first_loss": 3.25, "last_loss": 2.17,
               "eval_loss_before": 3.5, "eval_loss_after": 2.2, "tokens_per_second": speed, "mfu": 0.312,
               "peak_gpu_gib": gpu, "peak_host_gib": 3.2, "seconds": 812.4}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def colour_share(png: Path, colour: str) -> float:
    """Part of a picture's pixels that have (nearly) this colour."""
    pixels = imread(png)[..., :3]
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return float((abs(pixels - wanted).max(-1) < 0.02).mean())


def test_metrics_keep_order_and_skip_torn_lines(tmp_path):
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "lo{"step": 2, "loss": 2.5}', '{"step": 3, "loss": 2.0}', '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert report.read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 3, "loss": 2.0}]
    assert report.read_metrics(tmp_path / "absent") == []


def test_step_repeated_after_a_resume_counts_as_it_ran_last():
    metrics = [
        {"step": 2, "loss": 9.0},
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 1},
    ]
    assert report.series(metrics, "loss") == {1: 3.0, 2: 2.0}


def test_smoothing_keeps_ends_lines_and_means():
    assert plots.smoothed([5.0]) == [5.0]
    line = [float(i) for i in range(100)]
    assert plots.smoothed(line) == pytest.approx(line)  # no lag: a trailing average would lie below
    zigzag = [(-1.0) ** i for i in range(100)]
    assert max(map(abs, plots.smoothed(zigzag)[10:-10])) < 0.1
    assert plots.smoothed(zigzag)[0] == 1 and abs(plots.smoothed(zigzag)[-1]) < 0.3


def test_training_plots_show_their_data(tmp_path):
    run = write_run(tmp_path / "run")
    paths = plots.plot_training(run)
    assert [p.name for p in paths] == ["loss.png", "learning_rate.png", "throughput.png", "memory.png"]
    for path in paths:
        assert path.parent == run / "plots"
        assert colour_share(path, plots.COLOURS[0]) > 1e-3, path
    for name in ("loss", "throughput", "memory"):  # held-out points, median, host memory
        assert colour_share(run / "plots" / f"{name}.png", plots.COLOURS[1]) > 5e-4, name


def test_plot_without_gpu_leaves_gpu_memory_out(tmp_path):
    run = write_run(tmp_path / "run", gpu=0)
    plots.plot_training(run)
    assert colour_share(run / "plots" / "memory.png", plots.COLOURS[0]) == 0
    assert colour_share(run / "plots" / "memory.png", plots.COLOURS[1]) > 5e-4


def test_summary_of_a_whole_run(tmp_path, capsys):
    report.print_summary(write_run(tmp_path / "run"))
    out = capsys.readouterr().out
    figures = ["pytorch-ddp", "completed", "3.2500 → 2.1700", "3.5000 → 2.2000", "20,000", "31.2%", "9.10 GiB", "812 s"]
    assert [figure for figure in figures if figure not in out] == []
    assert str(tmp_path / "run") in out and "metrics.jsonl  summary.json" in out and "eval.json" not in out


def test_summary_of_a_killed_run(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (run / "summary.json").unlink()
    report.print_summary(run)
    out = capsys.readouterr().out
    assert "unfinished" in out and "60" in out and "→ 2.1697" in out
    (run / "summary.json").write_text('{"project": "pytorch-ddp", "status": "failed", "error": "the loss is nan"}')
    report.print_summary(run)
    out = capsys.readouterr().out
    assert "failed" in out and "the loss is nan" in out and "→ 2.1697" in out
    with pytest.raises(UserError, match="train first"):
        report.print_summary(tmp_path)


def test_evaluation_plot_shows_both_models(tmp_path):
    base = {"loss": 3.4, "perplexity": 30.0, "token_accuracy": 0.38, "bits_per_byte": 1.2}
    tuned = {"loss": 2.0, "perplexity": 7.4, "token_accuracy": 0.56, "bits_per_byte": 0.7}
    results = {"project": "pytorch-ddp", "rows": 200, "base": base, "fine_tuned": tuned}
    (tmp_path / "eval.json").write_text(json.dumps(results))
    path = plots.plot_evaluation(tmp_path)
    assert path == tmp_path / "plots" / "eval.png"
    lower, higher = colour_share(path, plots.COLOURS[1]), colour_share(path, plots.COLOURS[0])
    assert 0.02 < lower < higher  # three of the four figures fell


def test_command_compares_runs_without_torch(tmp_path):
    fast = write_run(tmp_path / "pytorch-ddp" / "config", "pytorch-ddp", speed=20_000)
    slow = write_run(tmp_path / "pytorch-fsdp" / "config", "pytorch-fsdp", speed=10_000)
    script = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('tools.compare', run_name='__main__')"
    command = [sys.executable, "-c", script, str(fast), str(slow)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines[:4])) <= 100
    assert any(line.startswith("pytorch-ddp ") and "20,000" in line for line in lines)
    assert any(line.startswith("pytorch-fsdp") and "10,000" in line for line in lines)
    bars = [colour_share(tmp_path / "comparison.png", colour) for colour in plots.COLOURS[:2]]
    assert bars[0] / bars[1] == pytest.approx(2, rel=0.2)  # a bar twice as long


def with_conditions(run: Path, gpus: list[str] | None = None, ranks: int = 2, **settings) -> Path:
    """The run's config.yaml and environment.json; `settings` are dotted keys with `__` for the dot."""
    import yaml

    config = {"model": {"name": "facebook/opt-1.3b"}, "data": {"name": "arxiv", "format": "text", "eval_rows": 200,
              "max_length": 512, "packing": "none"}, "train": {"global_batch_size": 16, "micro_batch_size": 4},
              "seed": 42}  # fmt: skip
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    described = [{"name": name, "memory_gib": 14.7} for name in gpus or []]
    environment = {"world_size": ranks, "gpus": described, "precision": "fp16: Tesla T4, has no bf16"}
    (run / "environment.json").write_text(json.dumps(environment))
    return run


T4S = ["Tesla T4", "Tesla T4"]


def test_equal_conditions_stand_once_above_the_table(tmp_path, capsys):
    compare.print_comparison(
        [with_conditions(write_run(tmp_path / name, f"pytorch-{name}"), T4S) for name in ("ddp", "fsdp")]
    )
    head, columns, *_ = (lines := capsys.readouterr().out.splitlines())
    assert head == (
        "model: facebook/opt-1.3b  data: arxiv, text, 200 held out  tokens: up to 512  batch: 16 (4 at once)  "
        "seed: 42  devices: 2 × Tesla T4 (14.7 GiB)  precision: fp16"
    )
    assert columns.split()[:2] == ["run", "status"] and not any("note" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "column", "values", "words"),
    [
        ({"train__global_batch_size": 32}, "batch", ("16 (4 at once)", "32 (4 at once)"), "same step"),
        ({"train__micro_batch_size": 2}, "batch", ("16 (4 at once)", "16 (2 at once)"), "speed and memory"),
        ({"gpus": ["Tesla T4"], "ranks": 1}, "devices", ("2 × Tesla T4", "1 × Tesla T4"), "speed and memory"),
        ({"gpus": [], "ranks": 2}, "devices", ("2 × Tesla T4", "2 CPU processes"), "speed and memory"),
        ({"data__max_length": 1024}, "tokens", ("up to 512", "up to 1024"), "speed and memory"),
        ({"data__packing": "wrapped"}, "tokens", ("up to 512", "up to 512, wrapped"), "speed and memory"),
        ({"data__packing": "documents"}, "tokens", ("up to 512", "up to 512, documents"), "speed and memory"),
        ({"seed": 7}, "seed", ("42", "7"), "same step"),
    ],
)
def test_what_differs_has_a_column_and_a_note(tmp_path, capsys, settings, column, values, words):
    one = with_conditions(write_run(tmp_path / "one"), T4S)
    other = with_conditions(write_run(tmp_path / "other"), **{"gpus": T4S, **settings})
    compare.print_comparison([one, other])
    head, columns, _, *rows, note = capsys.readouterr().out.splitlines()
    assert column not in head.split(": ")[0::2] and f"{column}:" not in head
    assert columns.split()[1] == column
    assert [value in row for value, row in zip(values, rows, strict=True)] == [True, True], rows
    assert note.startswith(f"note: these runs differ in {column}: ") and words in note


@pytest.mark.parametrize(
    "settings",
    [{"model__name": "tiny:qwen2"}, {"data__name": "imdb"}, {"data__eval_rows": 8}, {"data__format": "messages"},
     {"model__random_weights": True}],
    ids=str,
)  # fmt: skip
def test_runs_whose_losses_cannot_be_compared_have_tables_and_plots_of_their_own(tmp_path, capsys, settings):
    runs = [with_conditions(write_run(tmp_path / name, f"project-{name}"), T4S) for name in ("a", "b")]
    runs.insert(1, with_conditions(write_run(tmp_path / "c", "project-c"), T4S, **settings))
    compare.print_comparison(runs)
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if line.startswith("run ")]
    order = [line.split()[0] for line in out.splitlines() if line.startswith("project-")]
    assert len(tables) == 2 and order == ["project-a", "project-b", "project-c"]
    assert "note: 2 tables" in out and "differ in" not in out
    path = compare.plot_comparison(runs)
    one_table = compare.plot_comparison([runs[0], runs[2]])
    assert path == one_table == tmp_path / "comparison.png"
    assert compare.comparable(runs) == [[runs[0], runs[2]], [runs[1]]]


def test_a_row_of_the_plot_for_each_model(tmp_path):
    runs = [with_conditions(write_run(tmp_path / name, f"project-{name}"), T4S) for name in ("a", "b")]
    height = imread(compare.plot_comparison(runs)).shape[0]
    with_conditions(runs[1], T4S, model__name="tiny:opt")
    assert imread(compare.plot_comparison(runs)).shape[0] == 2 * height
    assert not list(tmp_path.glob(".*"))


def test_command_names_a_folder_without_a_run(tmp_path):
    command = [sys.executable, "-m", "tools.compare", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 2 and "train first" in done.stderr and "Traceback" not in done.stderr


def test_runs_of_one_project_keep_their_own_names(tmp_path, capsys):
    compare.print_comparison([write_run(tmp_path / name) for name in ("one", "two")])
    out = capsys.readouterr().out
    assert "pytorch-ddp/one" in out and "pytorch-ddp/two" in out
    same_name = [write_run(tmp_path / machine / "config") for machine in ("here", "there")]
    compare.print_comparison(same_name)
    out = capsys.readouterr().out
    assert str(same_name[0]) in out and str(same_name[1]) in out
