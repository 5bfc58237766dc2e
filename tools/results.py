"""What the READMEs and docs/ take from elsewhere: tables from the records in `results/`, and code.

`python -m tools.results` fills two kinds of blocks; `--check` changes nothing and fails, naming the file, if a block is
out of date.

    <!-- results: NAME --> … <!-- end results -->          the table NAME of BLOCKS, below
    <!-- code: FILE FUNCTION --> … <!-- end code -->       a function of FILE, without its docstring
    <!-- code: FILE FUNCTION: FIRST … LAST --> …           its lines from the one that begins with FIRST to LAST
    <!-- code: FILE.yaml KEY --> …                         a top-level key of a YAML file, with its comments

A table is a list of records and a list of columns; a column is its heading and a function of the record.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from common import errors
from common.config import REPOSITORY
from common.errors import UserError
from tools.kaggle import origin

CODE = re.compile(r"<!-- code: ([^>]+) -->(?:(?!<!-- code: ).)*?<!-- end code -->", re.DOTALL)
BLOCK = re.compile(r"<!-- results: ([^>]+) -->(?:(?!<!-- results: ).)*?<!-- end results -->", re.DOTALL)


def read(folder: Path, *names: str) -> list[dict]:
    """The records `NAME.json` of a folder; raises `UserError` if one is missing."""
    try:
        return [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such record; a program in bench/ writes it") from None


def table(records: list, columns: Mapping[str, Callable[..., object]], caption: str) -> str:
    """Markdown on lines of its own; the first column is left-aligned, the other ones right-aligned."""
    rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    rows += [[str(value(r)) for value in columns.values()] for r in records]
    return "\n".join(["\n", *(f"| {' | '.join(row)} |" for row in rows), "", f"*{caption}*", "\n"])


def shared(records: list[dict], value: Callable[..., object]) -> str:
    """What all records have in common, or everything that occurs."""
    return ", ".join(dict.fromkeys(str(value(r)) for r in records))


def share(r: dict) -> str:
    """What each process had of a GPU, such as 1/8; empty: all of it."""
    return r["environment"].get("gpu_share", "").partition(" ")[0]


def gpus_of(r: dict) -> str:
    """How many GPUs a record was measured on and which, such as `2 × NVIDIA H200`, or the share of one."""
    name = r["environment"]["gpus"][0]["name"]
    return f"{r['gpus']} × {share(r)} of one {name}" if share(r) else f"{len(r['environment']['gpus'])} × {name}"


def machine(records: list[dict]) -> str:
    """The caption of a table: hardware, versions, date, weights and text of its records."""
    gpus = shared(records, gpus_of)
    versions = shared(records, lambda r: f"torch {r['environment']['versions']['torch']}, {r['date']}")
    weights, text = (shared(records, lambda r, key=key: r.get(key, "not recorded")) for key in ("weights", "text"))
    form = shared(records, lambda r: f"{r['settings']['data.max_length']} tokens in {r['settings']['train.precision']}")
    return f"{gpus}, {versions}. Weights: {weights}. Text: {text}, {form}"


def limited(records: list[dict]) -> str:
    """The caption if each GPU has the memory of a smaller one."""
    limit = shared(records, lambda r: r["settings"]["runtime.gpu_memory_limit_gib"])
    return f"{machine(records)}. Each GPU limited to {limit} GiB."


def figure(text: str) -> Callable[[dict], str]:
    """A column of the summary's figures, which a failed run does not have."""
    return lambda r: text.format(**r["summary"]) if r["summary"]["status"] == "completed" else "–"


def provenance(records: list[dict]) -> str:
    """The commit that the records were measured at, their windows and the command, for the end of a caption."""
    commits = shared(records, lambda r: (r["environment"].get("git_commit") or "unknown").split()[0][:10])
    changed = any("with local changes" in (r["environment"].get("git_commit") or "") for r in records)
    said = [f"Commit {commits}{', with local changes' if changed else ''}."]
    if timed := [r["windows"] for r in records if r.get("windows")]:
        spread = max((max(w) - min(w)) / statistics.median(w) for w in timed)
        said.append(f"Medians of {len(timed[0])} windows, which differ by {spread:.1%} at most.")
    if commands := list(dict.fromkeys(r["measured_by"] for r in records if "measured_by" in r)):
        said.append(f"Made by {', '.join(f'`{command}`' for command in commands)}.")
    return " ".join(said)


def entry(text: str) -> Callable[[dict], str]:
    """A column of what is in the record in addition to its summary."""
    return lambda r: text.format(**r)


def speed(r: dict) -> float:
    """Tokens per second over all GPUs."""
    return statistics.median(r["windows"]) if r.get("windows") else r["summary"]["tokens_per_second"]


def tokens_per_second(r: dict) -> str:
    """The column of `speed`."""
    return f"{speed(r):,.0f}" if r["summary"]["status"] == "completed" else "–"


def tflops(r: dict) -> float:
    """TFLOP/s per GPU, from the model's FLOPs per token."""
    return speed(r) * r["summary"]["flops_per_token"] / r["gpus"] / 1e12


def speed_table(folder: Path, *names: str) -> str:
    """The speed-up is that over the first record, for runs that are compiled as it is."""
    records = read(folder, *(f"speed-{name}" for name in names))
    alike = [r for r in records if r["settings"]["train.compile"] == records[0]["settings"]["train.compile"]]
    columns = {
        "run": lambda r: r["label"],
        "GPUs": lambda r: r["gpus"],
        "batch": lambda r: f"{r['settings']['train.global_batch_size']}/{r['settings']['train.micro_batch_size']}",
        "tokens/s": tokens_per_second,
        "per GPU": lambda r: f"{speed(r) / r['gpus']:,.0f}",
        "TFLOP/s per GPU": lambda r: f"{tflops(r):.0f}",
        "of ceiling": lambda r: f"{tflops(r) / r['matmul_ceiling_tflops']:.1%}",
        "MFU": figure("{mfu:.1%}"),
        "peak GiB": figure("{peak_gpu_gib:.1f}"),
        "speed-up": lambda r: f"{speed(r) / speed(records[0]):.2f}×" if r in alike else "–",
    }
    ceiling = shared(records, lambda r: r["matmul_ceiling_tflops"])
    caption = f"{machine(records)}. Measured matmul ceiling: {ceiling} TFLOP/s per GPU. {provenance(records)}"
    return table(records, columns, caption)


def memory_table(folder: Path, *names: str) -> str:
    """What fits under a memory limit. No speeds: a limited GPU is as small as another one, not as slow."""
    records = read(folder, *(f"memory-{name}" for name in names))
    columns = {
        "run": lambda r: r["label"],
        "result": lambda r: r["summary"].get("error", "fits").split(". ")[0],
        "peak GiB": figure("{peak_gpu_gib:.2f}"),
        "steps": figure("{steps}"),
        "loss, first → last": figure("{first_loss:.3f} → {last_loss:.3f}"),
    }
    return table(records, columns, f"{limited(records)} {provenance(records)}")


def arithmetic_table(folder: Path, *names: str) -> str:
    """What the tensors of a GPU should take, by term, next to what they took."""
    records = read(folder, *(f"memory-{name}" for name in names))

    def gib(term: str) -> Callable[[dict], str]:
        return lambda r: f"{r['arithmetic_gib'][term]:.2f}"

    columns = {
        "GiB on each GPU": lambda r: r["label"],
        "state": gib("state"),
        "gathered": gib("gathered"),
        "inputs": gib("checkpoints"),
        "one layer": gib("one layer"),
        "loss": gib("loss"),
        "sum": gib("sum"),
        "measured": gib("measured"),
        "of the sum": lambda r: f"{r['arithmetic_gib']['measured / sum']:.0%}",
    }
    return table(records, columns, f"{machine(records)}. {provenance(records)}")


def io_table(folder: Path, name: str) -> str:
    """Seconds and host memory to load, save and export a model, by bench/fsdp_io.py."""
    (r,) = read(folder, name)
    columns = {
        "what": lambda phase: phase[0],
        "seconds": lambda phase: f"{phase[1]['seconds']:.1f}",
        "host memory, GiB more": lambda phase: f"{phase[1]['host_gib']:.1f}",
    }
    caption = (
        f"{r['gpus']} × {r['environment']['gpus'][0]['name']}, torch {r['environment']['versions']['torch']}, "
        f"{r['date']}, files in memory (/dev/shm). Published weights: {r['published_fp16_gib']:.2f} GiB in fp16, "
        f"masters {r['master_weights_gib']:.2f} GiB. Checkpoint: {r['writer']}. {provenance([r])}"
    )
    return table(list(r["phases"].items()), columns, caption)


def loss_table(folder: Path, name: str) -> str:
    """Memory, time and gradient error of the plain and the chunked loss, by bench/loss_memory.py."""
    (r,) = read(folder, name)
    cases = [(m, tokens, r[f"{m}_{tokens}_tokens"]) for tokens in (2048, 32768) for m in ("plain", "chunked")]
    columns = {
        "head and loss": lambda case: f"{case[0]}, {case[1]:,} tokens",
        "peak GiB": lambda case: f"{case[2]['peak_gib']:.2f}",
        "ms": lambda case: f"{case[2]['milliseconds']:.1f}",
        "gradient error": lambda case: f"{case[2]['gradient_error_weight']:.2%}" if case[1] == 2048 else "–",
    }
    return table(cases, columns, f"One {r['gpu']}, torch {r['torch']}. Head: {r['head'][0]:,} × {r['head'][1]}.")


def headline(folder: Path, *names: str) -> str:
    """One line for the main README, from a run on one GPU, one on several, one under a memory limit."""
    one, several, limited = read(folder, *names)
    return (
        f"{speed(several) / speed(one):.2f}× on {several['gpus']} {several['environment']['gpus'][0]['name']}, "
        f"{speed(several) / several['gpus']:,.0f} tokens/s each; {figure('{peak_gpu_gib:.1f}')(limited)} GiB of "
        f"{limited['settings']['runtime.gpu_memory_limit_gib']} at {limited['label']}"
    )


def offload_table(folder: Path, *names: str) -> str:
    """Micro-batch against speed and memory; host figures are of the whole process tree."""
    records = read(folder, *names)
    columns = {
        "run": lambda r: r["label"],
        "result": lambda r: r["summary"].get("error", "fits").split(". ")[0],
        "tokens/s": tokens_per_second,
        "seconds per step": lambda r: f"{r['last_steps'][0]['tokens'] / speed(r):.2f}" if r["last_steps"] else "–",
        "GPU peak GiB": figure("{peak_gpu_gib:.1f}"),
        "host peak GiB": figure("{peak_host_gib:.1f}"),
        "GPUs": lambda r: r["gpus"],
        "CPU cores": lambda r: r["environment"]["cpu_cores"],
    }
    return table(records, columns, f"{limited(records)} {provenance(records)}")


def prediction_table(folder: Path, *names: str) -> str:
    """What the preflight predicted next to what was measured, and the host's peak by phase."""
    records = read(folder, *names)

    def predicted(place: str, measured: str) -> dict[str, Callable[[dict], object]]:
        plan = lambda r: r["environment"]["memory_plan"][place]["predicted_gib"]  # noqa: E731
        peak = lambda r: r["summary"][measured]  # noqa: E731
        return {
            f"{place} predicted": lambda r: f"{plan(r):.1f}",
            f"{place} measured": lambda r: f"{peak(r):.1f}",
            f"{place} error": lambda r: f"{plan(r) / peak(r) - 1:+.0%}",
        }

    phases = ("load and first step", "training", "checkpoint and export")
    columns = {
        "run": lambda r: r["label"],
        **predicted("gpu", "peak_gpu_gib"),
        **predicted("host", "peak_host_gib"),
        "host by phase": lambda r: " / ".join(f"{r['host_peaks_gib'][phase]:.1f}" for phase in phases),
    }
    caption = f"{machine(records)}. GiB; phases: {', '.join(phases)}, each the peak so far. {provenance(records)}"
    return table(records, columns, caption)


def offload_headline(folder: Path, name: str) -> str:
    """One line for the main README: memory of host and GPU, and speed."""
    (r,) = read(folder, name)
    return (
        f"{r['summary']['peak_host_gib']:.1f} GiB of host memory and {r['summary']['peak_gpu_gib']:.1f} GiB of a GPU's "
        f"{r['settings']['runtime.gpu_memory_limit_gib']}; {speed(r):,.0f} tokens/s on one "
        f"{r['environment']['gpus'][0]['name']}"
    )


def pipeline_table(folder: Path, *names: str) -> str:
    """What the stages compute, and for which part of a step they do."""
    records = read(folder, *names)
    by_stage = lambda text, values: " / ".join(text.format(value) for value in values)  # noqa: E731

    def milliseconds(r: dict) -> list[float]:
        stages = [r[f"stage-times-{rank}"] for rank in range(r["gpus"])]
        return [1e3 * (stage["forward"] + stage["backward"]) for stage in stages]

    columns = {
        "run": lambda r: r["label"],
        "share of a GPU": lambda r: share(r) or "all",
        "layers by stage": lambda r: by_stage("{}", r["environment"]["pipeline"]["layers_by_stage"]),
        "ms per micro-batch": lambda r: by_stage("{:.0f}", milliseconds(r)),
        "peak GiB": lambda r: by_stage("{:.1f}", r["summary"]["peak_gpu_gib_by_rank"]),
        "tokens/s": tokens_per_second,
        "efficiency": lambda r: f"{r['efficiency']:.0%}",
        "ideal": lambda r: f"{r['ideal']:.0%}",
        "of the ideal": lambda r: f"{r['efficiency'] / r['ideal']:.0%}",
    }
    return table(records, columns, f"{limited(records)} {provenance(records)}")


def stage_costs_table(folder: Path, name: str) -> str:
    """What layers and head take by micro-batch, and the stages that follow."""
    (r,) = read(folder, name)
    columns = {
        "rows": lambda case: case["rows"],
        "embedding, ms": entry("{milliseconds[embedding]:.1f}"),
        "a layer, ms": entry("{milliseconds[layer]:.1f}"),
        "head and loss, ms": entry("{milliseconds[head]:.1f}"),
        "head in layers": lambda case: f"{case['milliseconds']['head'] / case['milliseconds']['layer']:.1f}",
        "two stages": lambda case: " / ".join(map(str, case["layers"]["2"])),
        "four stages": lambda case: " / ".join(map(str, case["layers"]["4"])),
    }
    caption = (
        f"One {r['environment']['gpus'][0]['name']}, torch {r['environment']['versions']['torch']}, {r['date']}. "
        f"{r['settings']['data.max_length']} tokens per row in {r['settings']['train.precision']}, a T4's attention "
        f"kernels, activation checkpointing {'on' if r['checkpointing'] else 'off'}; forward and backward. By "
        f"operations the head weighs {r['computed_head_layers']:.1f} layers. {provenance([r])}"
    )
    return table(r["cases"], columns, caption)


def pipeline_headline(folder: Path, name: str) -> str:
    """One line for the main README: memory of the two stages, and efficiency against the ideal."""
    (r,) = read(folder, name)
    peaks = " and ".join(f"{peak:.1f}" for peak in r["summary"]["peak_gpu_gib_by_rank"])
    return (
        f"{peaks} GiB of {r['settings']['runtime.gpu_memory_limit_gib']} on two stages; "
        f"{r['efficiency'] / r['ideal']:.0%} of the ideal efficiency with {r['label']} on {gpus_of(r)}"
    )


def profile_table(folder: Path, *names: str) -> str:
    """Where a step of rank 0 goes, by bench/step_profile.py."""
    records = read(folder, *names)
    columns = {
        "seconds": lambda r: r["label"],
        "step": entry("{step-profile[step]:.2f}"),
        "exchange": entry("{step-profile[exchange]:.2f}"),
        "compute alone": entry("{step-profile[only_compute]:.2f}"),
        "neither": entry("{step-profile[idle]:.2f}"),
        "longest pause between exchanges": entry("{step-profile[longest_pause]:.2f}"),
    }
    return table(records, columns, f"{limited(records)} {provenance(records)}")


def held_seconds(r: dict) -> float:
    """Device seconds that a search's trials took; they hold their devices for longer than they train."""
    search = r["summary"]["search"]
    return search["devices"] * search["wall_seconds"] * search["devices_busy"]


def search_table(folder: Path, *names: str) -> str:
    """What a search of ray-tune on GPUs took and found."""
    records = read(folder, *names)
    columns = {
        "search": lambda r: r["label"],
        "stopped": figure("{search[stopped]}"),
        "device seconds": lambda r: f"{held_seconds(r):.0f}",
        "seconds": figure("{search[wall_seconds]:.0f}"),
        "devices busy": figure("{search[devices_busy]:.0%}"),
        "best loss": figure("{search[best_eval_loss]:.4f}"),
        "default's": figure("{search[default_eval_loss]:.4f}"),
    }
    return table(records, columns, f"{limited(records)} {provenance(records)}")


def search_details_table(folder: Path, *names: str) -> str:
    """What `search_table` leaves out."""
    records = read(folder, *names)
    columns = {
        "search": lambda r: r["label"],
        "steps per trial": lambda r: r["settings"]["train.max_steps"],
        "device seconds held": lambda r: f"{held_seconds(r):.0f}",
        "device seconds training": figure("{search[device_seconds]:.0f}"),
        "best trial": figure("{search[best]}"),
        "its peak GPU GiB": figure("{peak_gpu_gib:.1f}"),
    }
    return table(records, columns, f"{limited(records)} {provenance(records)}")


def early_stopping_table(folder: Path, name: str) -> str:
    """ray-tune's rule replayed on whole curves: a row for each space, number of trials and first rung."""
    (r,) = read(folder, name)
    shipped = r["searches"][0]["reduction_factor"]
    rows = [
        row | {"space": space}
        for space, replays in r["replays"].items()
        for row in replays
        if row["reduction_factor"] == shipped
    ]
    draws, within = len(r["seeds"]), r["noise"]["within"]
    columns = {
        "space": lambda row: row["space"],
        "trials": lambda row: row["trials"],
        "first rung": lambda row: row["grace_period"],
        "steps taken, mean": entry("{ours[share]:.0%}"),
        "largest": entry("{ours[largest_share]:.0%}"),
        "draws with at most half": entry("{ours[at_most_half]}"),
        "draws with the best found": entry("{ours[best_found]}"),
        "or one within noise": entry("{ours[best_within_noise]}"),
        "loss missed, mean": entry("{ours[missed]:.3f}"),
        "largest miss": entry("{ours[most_missed]:.3f}"),
    }
    caption = (
        f"Two slots on a {r['machine']}, torch {r['environment']['versions']['torch']}, {r['date']}. {draws} draws of "
        f"the trials. Budget {r['budget']} steps, reduction {shipped}. Noise: a difference of at most {within:.2f}. "
        f"{provenance([r])}"
    )
    return table(rows, columns, caption)


def early_stopping_headline(folder: Path, replays: str, with_it: str, without: str) -> str:
    """What early stopping takes of a search without it: on a GPU, and replayed for the shipped embedded search."""
    r, stopped, whole = read(folder, replays, with_it, without)
    search, whole_search = stopped["summary"]["search"], whole["summary"]["search"]
    best = "the same best" if search["best"] == whole_search["best"] else "another best"
    taken = held_seconds(stopped) / held_seconds(whole)
    real = r["searches"][0]
    wanted = {key: real[key] for key in ("trials", "grace_period", "reduction_factor")}
    row = next(row for row in r["replays"]["smoke.yaml"] if wanted.items() <= row.items())["ours"]
    return (
        f"early stopping takes {taken:.0%} of the device seconds of {search['trials']} trials on "
        f"{gpus_of(stopped)}, {best}; {row['share']:.0%} of the steps of {real['trials']} with the embedded model, "
        f"the same best within noise in {row['best_within_noise']} of {len(r['seeds'])} draws"
    )


def ray_train_table(folder: Path, *names: str) -> str:
    """What Ray costs. Single steps show how far two runs are apart by chance."""
    records = read(folder, *names)
    columns = {
        "run": lambda r: r["label"],
        "tokens/s": tokens_per_second,
        "steps 3, 4, 5 and last, s": lambda r: " / ".join(
            f"{step['step_seconds']:.2f}" for step in (*r["first_steps"][3:6], *r["last_steps"])
        ),
        "GPU GiB": figure("{peak_gpu_gib:.1f}"),
        "host GiB": figure("{peak_host_gib:.1f}"),
        "last loss": figure("{last_loss:.3f} (step {steps})"),
    }
    is_limited = all("runtime.gpu_memory_limit_gib" in r["settings"] for r in records)
    return table(
        records, columns, f"{limited(records) if is_limited else machine(records) + '.'} {provenance(records)}"
    )


def ray_train_headline(folder: Path, *names: str) -> str:
    """One line for the main README: memory, and speed against the same run without Ray."""
    ray, plain = read(folder, *names)
    return (
        f"{ray['summary']['peak_gpu_gib']:.1f} GiB of {ray['settings']['runtime.gpu_memory_limit_gib']} at "
        f"{ray['label']}, {speed(ray) / speed(plain):.1%} of the speed without Ray on {gpus_of(ray)}"
    )


def foundry_table(folder: Path, *names: str) -> str:
    """Tokens per second, how much of a batch is tokens and not padding, and how long a step takes."""
    records = read(folder, *names)

    def steps(r: dict) -> list[dict]:  # those that the record has, but for the first
        return [*(step for step in r["first_steps"] if step["step"] > 1), *r["last_steps"]]

    def places(r: dict) -> int:
        return int(r["settings"]["train.global_batch_size"]) * int(r["settings"]["data.max_length"])

    columns = {
        "run": lambda r: r["label"],
        "tokens/s": tokens_per_second,
        "batch filled": lambda r: f"{statistics.mean(step['tokens'] for step in steps(r)) / places(r):.0%}",
        "median step, s": lambda r: f"{statistics.median(step['step_seconds'] for step in steps(r)):.2f}",
        "peak GiB": figure("{peak_gpu_gib:.1f}"),
    }
    return table(records, columns, f"{limited(records)} {provenance(records)}")


def foundry_headline(folder: Path, name: str) -> str:
    """One line for the main README: memory and speed."""
    (r,) = read(folder, name)
    return (
        f"{r['summary']['peak_gpu_gib']:.1f} GiB of {r['settings']['runtime.gpu_memory_limit_gib']}, "
        f"{speed(r):,.0f} tokens/s on {gpus_of(r)}"
    )


def equality_table(folder: Path, name: str) -> str:
    """Losses of all projects on the same model and rows, next to a plain loop's."""
    (r,) = read(folder, name)
    plain, steps = r["plain"], len(r["plain"])

    def furthest(curve: list, which: int) -> str:
        if curve is plain:
            return "–"
        return f"{max(abs(a[which] / b[which] - 1) for a, b in zip(curve, plain, strict=True)):.0e}"

    columns = {
        "project": lambda row: row[0],
        "loss of step 1": lambda row: f"{row[1][0][0]:.6f}",
        f"of step {steps // 2}": lambda row: f"{row[1][steps // 2 - 1][0]:.6f}",
        f"of step {steps}": lambda row: f"{row[1][-1][0]:.6f}",
        "largest distance of a loss": lambda row: furthest(row[1], 0),
        "of a gradient norm": lambda row: furthest(row[1], 1),
    }
    rows = [("plain loop, one process", plain)]
    rows += [(f"`{project}`, {r['launchers'][project]}", curve) for project, curve in r["projects"].items()]
    caption = (
        f"{r['settings']['model.name']} on Python's docstrings, fp32, a global batch of "
        f"{r['settings']['train.global_batch_size']}; two processes on a CPU (of `ray-tune` one trial), torch "
        f"{r['environment']['versions']['torch']}, LLM Foundry's own being 2.7; {r['date']}. Distances are relative."
    )
    return table(rows, columns, caption)


def agreement_table(folder: Path, name: str) -> str:
    """Whose documented loop computes the mean over all targets of a global batch."""
    (r,) = read(folder, name)
    columns = {
        "loop, as documented": lambda row: row[0] + (f", {row[1]['version']}" if row[1]["version"] else ""),
        "held-out loss": lambda row: f"{row[1]['held_out_loss']:.6f}",
        "weights apart": lambda row: (
            f"{row[1]['weights']:.0%}" if row[1]["weights"] > 1e-3 else f"{row[1]['weights']:.0e}"
        ),
        "exact": lambda row: "yes" if row[1]["weights"] < 1e-3 else "no",
    }
    rows = [("plain loop, one process", {"version": "", "held_out_loss": r["held_out_loss"], "weights": 0.0})]
    rows += sorted(r["loops"].items(), key=lambda row: row[1]["weights"])
    caption = (
        f"{r['settings']['model.name']}, {r['settings']['train.max_steps']} steps, fp32, two processes on a CPU; "
        f"prompts are masked, so that micro-batches have unequal numbers of targets. Weights apart: how far they are "
        f"from the plain loop's, relative to how far it moved. With equally many targets per row, all are within 1e-5, "
        f"but for DeepSpeed's PipelineModule (8e-3), which counts a tied weight twice in the gradient norm. "
        f"{r['date']}, torch {r['environment']['versions']['torch']}. "
        f"{provenance([r])} Made by `python bench/agreement.py`."
    )
    return table(rows, columns, caption)


PACKINGS = ("padded", "padded-more", "wrapped", "documents")


def packing_speed_table(folder: Path, setting: str) -> str:
    """Padded, wrapped and packed rows under two projects; nothing before bench/packing.py has measured them."""
    projects = ("pytorch-ddp", "pytorch-fsdp")
    if not any(folder.glob(f"{setting}-*.json")):
        return "\n"
    records = read(folder, *(f"{setting}-{project}-{name}" for project in projects for name in PACKINGS))
    padded = {r["project"]: r for r in records[:: len(PACKINGS)]}

    def speed_up(r: dict) -> str:
        reference = padded[r["project"]]
        return f"{speed(r) / speed(reference):.2f}×" if "filled" in r and "filled" in reference else "–"

    columns = {
        "rows": lambda r: f"{r['label']}, `{r['project']}`",
        "batch": lambda r: f"{r['settings']['train.global_batch_size']}/{r['settings']['train.micro_batch_size']}",
        "tokens/s, without padding": tokens_per_second,
        "of padded": speed_up,
        "places filled": lambda r: f"{r['filled']:.1%}" if "filled" in r else "–",
        "peak GiB": figure("{peak_gpu_gib:.1f}"),
    }
    caption = limited(records) if "runtime.gpu_memory_limit_gib" in records[0]["settings"] else f"{machine(records)}."
    return table(records, columns, f"{caption} {provenance(records)}")


def packing_loss_table(folder: Path, setting: str) -> str:
    """The held-out loss after an epoch of padded, wrapped and packed rows; nothing before they were measured."""
    if not any(folder.glob(f"{setting}-*.json")):
        return "\n"
    records = read(folder, *(f"{setting}-pytorch-ddp-{name}" for name in PACKINGS[1:]))
    columns = {
        "rows": lambda r: r["label"],
        "sequences per step": lambda r: r["settings"]["train.global_batch_size"],
        "steps": figure("{steps}"),
        "tokens trained on": entry("{tokens:,}"),
        "places filled": entry("{filled:.0%}"),
        "held-out loss before": figure("{eval_loss_before:.4f}"),
        "after": figure("{eval_loss_after:.4f}"),
    }
    untimed = [{**record, "windows": []} for record in records]  # other work may have shared the GPUs
    return table(records, columns, f"`pytorch-ddp`, {machine(records)}. {provenance(untimed)}")


def packing_blocks_table(folder: Path, name: str) -> str:
    """Into how many blocks we and TRL pack the same rows."""
    (r,) = read(folder, name)
    columns = {
        "tokens per block": entry("{size:,}"),
        "blocks": entry("{ours:,}"),
        "`trl.pack_dataset`": entry("{trl:,}"),
        "the same, all rows at once": entry("{trl_at_once:,}"),
        "least, if rows were cut": entry("{least:,}"),
    }
    caption = f"{r['sizes'][0]['rows']:,} rows of GSM8K, trl {r['environment']['trl']} (`bfd`), {r['date']}."
    return table(r["sizes"], columns, f"{caption} {provenance([r])}")


PLAIN = "plain loop"
ORDERS = "five"
KILLED = " killed"
REAL_TASKS = {"abstracts": "abstracts", "gsm8k": "GSM8K", "messages": "GSM8K as chat"}


def band(record: dict) -> tuple[float, float] | None:
    """Where one more run of the plain loop would end with 95%: held-out loss, from its orders of the training rows.

    The prediction interval of normal draws, mean ± t · s · √(1 + 1/n). The range of the n runs themselves would be no
    test: one more of the same kind falls outside with a probability of 2 / (n + 1).
    """
    from scipy import stats

    ends = [run["eval_loss_after"] for run in record.get("plain", {}).values() if run["status"] == "completed"]
    if len(ends) < 3:
        return None
    mean, spread = statistics.mean(ends), statistics.stdev(ends) * (1 + 1 / len(ends)) ** 0.5
    reach = float(stats.t.ppf(0.975, len(ends) - 1)) * spread
    return mean - reach, mean + reach


def real_records(folder: Path) -> list[dict]:
    """The records of bench/real.py that are there, in the order of the tables."""
    paths = [folder / f"{task}-{precision}.json" for task in REAL_TASKS for precision in ("bf16", "fp16")]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def real_heading(record: dict) -> str:
    """The column's heading for a record of bench/real.py: task and precision."""
    return f"{REAL_TASKS[record['task']]}, {record['precision']}"


def real_projects(records: list[dict]) -> list[str]:
    """The projects of the records, each once, by name; LLM Foundry and then Ray's come last."""
    order = [name for record in records for name in record["projects"] if not name.endswith(KILLED)]
    return sorted(dict.fromkeys(order), key=lambda name: (name.startswith("ray"), name == "llm-foundry-finetune", name))


def real_machine(records: list[dict]) -> str:
    """Hardware, versions, date and commit of the projects' runs."""
    runs = [run for r in records for run in r["projects"].values() if run.get("environment")]
    gpus = shared(runs, lambda run: f"{len(run['environment']['gpus'])} × {run['environment']['gpus'][0]['name']}"
                  if run["environment"]["gpus"] else "a CPU")  # fmt: skip
    versions = [f"{name} {shared(runs, lambda run, name=name: run['environment']['versions'].get(name, 'none'))}"
                for name in ("torch", "transformers")]  # fmt: skip
    dates = shared(runs, lambda run: run["date"])
    commits = shared(runs, lambda run: (run["environment"].get("git_commit") or "unknown").split()[0][:10])
    return f"{gpus}, {', '.join(versions)}; {dates}, commit {commits}"


def against_plain(record: dict, run: dict) -> str:
    """A run's held-out loss, and how far it is outside of the plain loop's interval, if it is."""
    limits, loss = band(record), run["eval_loss_after"]
    beyond = max(limits[0] - loss, loss - limits[1], 0) if limits else 0
    return f"{loss:.4f}" + (f" ({beyond:.1g} outside)" if beyond else "")


def real_losses(folder: Path) -> str:
    """Held-out losses of one real model after the same training by all projects, next to a plain loop's."""
    records = real_records(folder)
    if not records:
        return "\n\n*Not measured yet: `python bench/real.py` writes the records.*\n\n"

    def ends(r: dict, name: str) -> str:
        limits, run = band(r), r["projects"].get(name, {})
        if name == "base":
            runs = [run for run in [*r["plain"].values(), *r["projects"].values()] if run.get("eval_loss_before")]
            return f"{runs[0]['eval_loss_before']:.4f}" if runs else "–"
        if name == PLAIN:
            return f"{limits[0]:.4f} to {limits[1]:.4f}" if limits else "–"
        if run.get("status") != "completed":
            return "failed" if run.get("status") == "failed" else "–"
        return against_plain(r, run)

    names = {"base": "before training", PLAIN: f"{PLAIN}, one GPU, {ORDERS} orders of the rows, 95%"}
    names |= {name: f"`{name}`" for name in real_projects(records)}
    columns: dict[str, Callable[..., str]] = {"held-out loss": lambda name: names[name]}
    columns |= {real_heading(r): lambda name, r=r: ends(r, name) for r in records}
    caption = (
        f"SmolLM2-135M-Instruct, {real_machine(records)}. Each process has 14.7 GiB of its GPU, a T4's. –: not run, or "
        f"a format that LLM Foundry does not take."
    )
    plot = "![Training loss of all projects over the spread of the plain loop](results/real/losses.png)\n\n"
    return table(list(names), columns, caption) + plot


def real_closeness(folder: Path) -> str:
    """How far the first 20 losses of each project are from those of the plain loop on the same rows."""
    records = real_records(folder)

    def furthest(r: dict, name: str) -> str:
        plain, losses = (run.get("losses", [])[:20] for run in (r["plain"].get("42", {}), r["projects"].get(name, {})))
        return f"{max(abs(a / b - 1) for a, b in zip(losses, plain, strict=False)):.0e}" if plain and losses else "–"

    columns: dict[str, Callable[..., str]] = {"largest distance of the first 20 losses": lambda name: f"`{name}`"}
    columns |= {real_heading(r): lambda name, r=r: furthest(r, name) for r in records}
    caption = "Relative, from the plain loop that sees the same rows in each step."
    return table(real_projects(records), columns, caption) if records else ""


def real_answers(folder: Path) -> str:
    """What the fine-tuned models make of held-out rows: perplexity, and ROUGE-L of generated answers."""
    records = real_records(folder)

    def figures(r: dict, name: str) -> str:
        runs = [run["evaluation"] for run in r["projects"].values() if "evaluation" in run]
        if name != "base":
            runs = [run for run in (r["projects"].get(name, {}).get("evaluation"),) if run]
        if not runs:
            return "–"
        found = runs[0]["base" if name == "base" else "fine_tuned"]
        return f"{found['perplexity']:.2f}" + (f" / {found['rouge_l']:.3f}" if "rouge_l" in found else "")

    columns: dict[str, Callable[..., str]] = {
        "perplexity / ROUGE-L": lambda name: "before training" if name == "base" else f"`{name}`"
    }
    columns |= {real_heading(r): lambda name, r=r: figures(r, name) for r in records}
    names = ["base", *real_projects(records)]
    return table(names, columns, "By each project's eval.py; greedy answers.") if records else ""


def real_killed(folder: Path) -> str:
    """Runs that were killed and started again, next to the same runs without that."""
    rows = [(r, name) for r in real_records(folder) for name in r["projects"] if name.endswith(KILLED)]
    if not rows:
        return ""

    def apart(losses: list[float], others: list[float], start: int) -> str:
        return f"{statistics.median(abs(a / b - 1) for a, b in zip(losses[start:], others[start:], strict=True)):.1%}"

    def cells(r: dict, name: str) -> dict[str, str]:
        killed, whole = r["projects"][name], r["projects"][name.removesuffix(KILLED)]
        step = killed["killed_at"]
        return {
            "project": f"`{name.removesuffix(KILLED)}`",
            "task": real_heading(r),
            "killed after step": f"{step} of {len(whole['losses'])}",
            "held-out loss": against_plain(r, killed),
            "not killed": f"{whole['eval_loss_after']:.4f}",
            "training losses after the kill differ by": apart(killed["losses"], whole["losses"], step),
        }

    table_rows = [cells(r, name) for r, name in rows]
    (record, name), *_ = rows
    plain, step = record["plain"], record["projects"][name]["killed_at"]
    orders = [apart(run["losses"], plain["42"]["losses"], step) for seed, run in plain.items() if seed != "42"]
    caption = (
        f"Medians over the steps after the kill, relative. Two runs of the plain loop that see the rows in different "
        f"orders are {min(orders)} to {max(orders)} apart: a resumed run that lost its place in the data would be too."
    )
    columns: dict[str, Callable[..., str]] = {key: lambda row, key=key: row[key] for key in table_rows[0]}
    return table(table_rows, columns, caption)


def hardware(results: Path) -> str:
    """What one run of each project takes of a 16 GB GPU and of the host, and its speed on the GPU it ran on."""
    records = [read(results.parent / project, name)[0] for project, name in HARDWARE.items()]
    by_stage = lambda r: r["summary"].get("peak_gpu_gib_by_rank", [r["summary"]["peak_gpu_gib"]])  # noqa: E731

    def fits_on(r: dict) -> str:
        return "1 × 16 GB per trial" if r["project"] == "ray-tune" else f"{r['gpus']} × 16 GB"

    columns = {
        "project": lambda r: f"[`{r['project']}`]({r['project']}/README.md)",
        "GPU, GiB": lambda r: " / ".join(f"{peak:.1f}" for peak in by_stage(r)),
        "host, GiB": figure("{peak_host_gib:.1f}"),
        "tokens/s": tokens_per_second,
        "measured on": gpus_of,
        "fits on": fits_on,
    }
    limit = shared(records, lambda r: r["settings"]["runtime.gpu_memory_limit_gib"])
    form = shared(records, lambda r: r["settings"]["train.precision"])
    versions = shared(records, lambda r: r["environment"]["versions"]["torch"])
    dates = sorted(r["date"] for r in records)
    commits = shared(
        [r for r in records if r["environment"].get("git_commit")], lambda r: r["environment"]["git_commit"][:10]
    )
    caption = (
        f"Peak memory per GPU (per stage in `deepspeed-pipeline`) and of the host; tokens/s of all GPUs together. Each "
        f"process may allocate {limit} GiB, what a 16 GB T4 offers, and computes in {form}. `1/2 of one` GPU: two "
        f"processes share it. In `ray-tune`, two trials share it, and the figures are the best trial's. Host memory "
        f"in `ray-train` is that of one of two Ray nodes, with one worker each. Random weights of the published "
        f"shapes, torch {versions}, {dates[0]} to {dates[-1]}, commits {commits} with local changes (`pytorch-ddp`: "
        f"not recorded)."
    )
    return table(records, columns, caption)


def kaggle_badge(folder: Path, project: str) -> str:
    """A badge that opens the project's training on Kaggle, from the repository whose address is in pyproject.toml."""
    notebook = f"{origin(folder.parent.parent)[0]}/blob/main/{project}/notebooks/train.ipynb"
    image = "https://kaggle.com/static/images/open-in-kaggle.svg"
    return f"[![Open in Kaggle]({image})](https://kaggle.com/kernels/welcome?src={notebook})"


# The run of each project that the main README's hardware table shows, in results/PROJECT/.
HARDWARE = {
    "pytorch-ddp": "memory-micro-4",
    "pytorch-fsdp": "memory-micro-8",
    "deepspeed-offload": "1024-micro-16",
    "deepspeed-pipeline": "shipped",
    "llm-foundry-finetune": "speed-t4-settings",
    "ray-train": "2gpu-micro-4",
    "ray-tune": "1gpu-six-asha",
}
OFFLOAD_CASES = ("512-micro-4", "512-micro-16", "512-micro-32", "1024-micro-16", "two-gpus", "host-16-deepspeed")

BLOCKS: dict[str, tuple] = {  # "PROJECT TABLE": what makes it, from which records of results/PROJECT/
    "hardware": (hardware,),
    **{f"kaggle {project}": (kaggle_badge, project) for project in HARDWARE},
    "real losses": (real_losses,),
    "real closeness": (real_closeness,),
    "real answers": (real_answers,),
    "real killed": (real_killed,),
    "equality losses": (equality_table, "losses"),
    "agreement losses": (agreement_table, "losses"),
    "packing t4": (packing_speed_table, "t4"),
    "packing bf16": (packing_speed_table, "bf16"),
    "packing loss": (packing_loss_table, "loss"),
    "packing blocks": (packing_blocks_table, "blocks"),
    "pytorch-ddp speed": (speed_table, "1gpu", "2gpu", "2gpu-no-p2p", "2gpu-no-p2p-bf16", "2gpu-eager"),
    "pytorch-ddp memory": (memory_table, "micro-4", "micro-8", "micro-16", "micro-16-checkpointing"),
    "pytorch-ddp loss": (loss_table, "loss-memory"),
    "pytorch-fsdp speed": (speed_table, "1gpu", "2gpu", "2gpu-ddp", "2gpu-no-p2p"),
    "pytorch-fsdp memory": (
        memory_table,
        "ddp",
        "micro-1-plain",
        "micro-1",
        "micro-4",
        "micro-8",
        "micro-4-no-sync",
        "offload",
    ),
    "pytorch-fsdp arithmetic": (arithmetic_table, "micro-1", "micro-4", "micro-8", "micro-4-no-sync", "offload"),
    "pytorch-fsdp io": (io_table, "io"),
    "pytorch-fsdp headline": (headline, "speed-1gpu", "speed-2gpu", "memory-micro-8"),
    "deepspeed-offload speed": (offload_table, *OFFLOAD_CASES),
    "deepspeed-offload prediction": (prediction_table, *OFFLOAD_CASES),
    "deepspeed-offload headline": (offload_headline, "1024-micro-16"),
    "deepspeed-pipeline efficiency": (pipeline_table, *(f"2-stages-micro-{m}" for m in (2, 4, 8, 16, 32))),
    "deepspeed-pipeline four stages": (pipeline_table, "4-stages"),
    "deepspeed-pipeline shipped": (pipeline_table, "shipped-computed", "shipped"),
    "deepspeed-pipeline costs": (stage_costs_table, "stage-costs"),
    "deepspeed-pipeline headline": (pipeline_headline, "2-stages-micro-16"),
    "llm-foundry-finetune speed": (foundry_table, "speed-t4-settings", "speed-t4-settings-fsdp"),
    "llm-foundry-finetune profile": (profile_table, "profile", "profile-fsdp", "profile-fsdp-no-prefetch"),
    "llm-foundry-finetune headline": (foundry_headline, "speed-t4-settings"),
    "ray-train speed": (ray_train_table, "2gpu-micro-4", "2gpu-micro-4-plain"),
    "ray-train four GPUs": (ray_train_table, "4gpu-micro-4"),
    "ray-train headline": (ray_train_headline, "2gpu-micro-4", "2gpu-micro-4-plain"),
    "ray-train one GPU": (ray_train_table, "1gpu-micro-4", "1gpu-micro-4-plain"),
    "ray-tune search": (search_table, "six-asha", "asha", "none", "sixteen-asha", "sixteen-none", "1gpu-six-asha"),
    "ray-tune search details": (
        search_details_table,
        "six-asha",
        "asha",
        "none",
        "sixteen-asha",
        "sixteen-none",
        "1gpu-six-asha",
    ),
    "ray-tune early stopping": (early_stopping_table, "early-stopping"),
    "ray-tune headline": (early_stopping_headline, "early-stopping", "sixteen-asha", "sixteen-none"),
    "pytorch-ddp headline": (headline, "speed-1gpu", "speed-2gpu", "memory-micro-4"),
}


def block(name: str, results: Path) -> str:
    """The table or figure `name` of BLOCKS, in Markdown."""
    make, *names = BLOCKS[name]
    return make(results / name.split()[0], *names)


def tables(project: str, results: Path) -> list[str]:
    """All that was measured of a project, but for its line in the main README."""
    return [block(name, results) for name in BLOCKS if name.split()[0] == project and not name.endswith("headline")]


def excerpt(what: str, repository: Path) -> str:
    """The code that a block `FILE NAME[: FIRST … LAST]` names, dedented. Raises `UserError` if it is not there.

    NAME is a function or class of a Python file, or a top-level key of a YAML file.
    """
    place, _, lines = what.partition(": ")
    file, _, name = place.partition(" ")
    path = repository / file
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    code = _yaml_section(source, name) if is_yaml(file) else _function(source, name)
    if not code:
        raise UserError(f"<!-- code: {what} -->: no {name} in {file}")
    if lines:
        first, _, last = lines.partition(" … ")
        begins = [i for i, line in enumerate(code) if line.strip().startswith(first)]
        ends = [i for i, line in enumerate(code) if line.strip().startswith(last or first)]
        if not begins or not ends or ends[-1] < begins[0]:
            raise UserError(f"<!-- code: {what} -->: {name} of {file} has no such lines")
        code = code[begins[0] : ends[-1] + 1]
    return textwrap.dedent("\n".join(code))


def code_block(what: str, repository: Path) -> str:
    """The code that `what` names, as Markdown, under the file's name."""
    return f"`{what.partition(' ')[0]}`\n\n{fenced(what, repository)}"


def fenced(what: str, repository: Path) -> str:
    """The code that `what` names, in a fence of its language."""
    language = "yaml" if is_yaml(what.partition(" ")[0]) else "python"
    return f"```{language}\n{excerpt(what, repository)}\n```"


def is_yaml(file: str) -> bool:
    """Whether the name is that of a YAML file, of which a top-level key is shown, not a function."""
    return file.endswith((".yaml", ".yml"))


def _function(source: str, name: str) -> list[str]:
    """Lines of the function or class `name` without its docstring; empty: there is none."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    found = next((node for node in nodes if node.name == name), None)
    if found is None:
        return []
    code = source.splitlines()[found.lineno - 1 : found.end_lineno]
    if ast.get_docstring(found) is not None:
        docstring = found.body[0]
        del code[docstring.lineno - found.lineno : (docstring.end_lineno or 0) - found.lineno + 1]
    return code


def _yaml_section(source: str, key: str) -> list[str]:
    """Lines of the top-level `key`, up to the next one or to the comment above that; empty: there is none."""
    lines = source.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith(f"{key}:")), len(lines))
    end = begin + 1
    while end < len(lines) and (not lines[end] or lines[end][0] in " #-"):
        end += 1
    while end > begin + 1 and (not lines[end - 1] or lines[end - 1][0] == "#"):
        end -= 1
    return lines[begin:end]


def filled(text: str, repository: Path) -> str:
    """`text` with every block filled again."""

    def fill(found: re.Match) -> str:
        name = found[1]
        if name not in BLOCKS:
            raise UserError(f"<!-- results: {name} -->: no such block; there are: {', '.join(BLOCKS)}")
        return f"<!-- results: {name} -->{block(name, repository / 'results')}<!-- end results -->"

    def fill_code(found: re.Match) -> str:
        return f"<!-- code: {found[1]} -->\n{fenced(found[1], repository)}\n<!-- end code -->"

    for kind, pattern, make in (("results", BLOCK, fill), ("code", CODE, fill_code)):
        text, blocks = pattern.subn(make, text)
        if blocks != text.count(f"<!-- {kind}: "):
            raise UserError(f"a block `<!-- {kind}: NAME -->` has no `<!-- end {kind} -->`")
    return text


def update(repository: Path, check: bool) -> None:
    """Rewrite the READMEs and docs/; with `check`, raise `UserError` if one would change."""
    paths = [repository / "README.md", *sorted(repository.glob("*/README.md")), *sorted(repository.glob("docs/*.md"))]
    old = {path: path.read_text(encoding="utf-8") for path in paths}
    new = {path: filled(text, repository) for path, text in old.items()}
    changed = [path for path in paths if new[path] != old[path]]
    if changed and check:
        stale = ", ".join(str(path.relative_to(repository)) for path in changed)
        raise UserError(f"out of date: {stale}; bring them up to date with: make format")
    for path in changed:
        path.write_text(new[path], encoding="utf-8")


if __name__ == "__main__":
    errors.run(lambda: update(REPOSITORY, check="--check" in sys.argv))
