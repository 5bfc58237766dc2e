"""What the notebooks call. They launch a project's scripts and show what these left, and define nothing themselves.

Importing this module needs the standard library only: `install` brings the rest. Nothing here touches CUDA: a kernel
that had would take memory from the training, which runs in processes of its own.
"""

from __future__ import annotations

import codecs
import datetime
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import PIL.Image

REPOSITORY = Path(__file__).resolve().parent.parent
KAGGLE = Path("/kaggle")
KAGGLE_KEEPS_GB = 20  # of /kaggle/working, when a session ends
PAGE_WIDTH = 840  # pixels that an output has in nbconvert's page
BAR = re.compile(r"\[(\d+:)?\d\d:\d\d[<,]")  # tqdm's [elapsed<remaining, rate]
RECORDS = [
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "summary.json",
    "plots",
    "eval.json",
    "samples.md",
    "trials.csv",
]


class CellFailed(Exception):
    """Ends a cell with one line instead of a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{self}"]


def install(extra: str) -> None:
    """Install what the project needs and this environment lacks; `extra` is one of pyproject.toml's.

    The torch that is there stays: it fits the machine's GPUs and drivers. Raises `CellFailed` if pip fails.
    """
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lacking = [r for r in project["dependencies"] + project["optional-dependencies"][extra] if not _is_there(r)]
    torch = _version("torch")
    if lacking:
        print(f"installing {', '.join(lacking)} ...", flush=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraint:
            constraint.write(f"torch=={torch}\n" if torch else "")
            constraint.flush()
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraint.name, *lacking]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode and re.search("NewConnectionError|NameResolutionError|Network is unreachable", done.stdout):
            raise CellFailed(
                f"{', '.join(lacking)} cannot be installed, the package index does not answer: on Kaggle choose "
                "Settings → Internet → On"
            )
        if done.returncode:
            raise CellFailed(f"pip could not install {', '.join(lacking)}:\n{done.stdout[-2000:]}")
        importlib.invalidate_caches()
    shown = ["torch", "transformers", "datasets", "accelerate"]
    shown += [name for name in map(_name, project["optional-dependencies"][extra]) if name not in shown]
    for name in shown:
        print(f"{name:15} {_version(name)}")


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_there(requirement: str) -> bool:
    from pip._vendor.packaging.requirements import Requirement

    wanted, found = Requirement(requirement), _version(_name(requirement))
    return found is not None and wanted.specifier.contains(found, prereleases=True)


def gpus() -> list[dict[str, str]]:
    """Name, memory and compute capability of each GPU that CUDA_VISIBLE_DEVICES leaves, as the driver reports them."""
    keys = ("index", "uuid", "name", "memory", "capability")
    try:
        query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,compute_cap", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    found = [dict(zip(keys, map(str.strip, line.split(",")), strict=True)) for line in lines]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return found
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [gpu for gpu in found if any(gpu["index"] == name or gpu["uuid"].startswith(name) for name in names)]


def processes() -> int:
    """How many processes the launch scripts start here: NPROC_PER_NODE, or one per GPU, or two on the CPU."""
    return int(os.environ.get("NPROC_PER_NODE", 0)) or len(gpus()) * int(os.environ.get("GPU_SHARES") or 1) or 2


def check_machine(wanted_gpus: int = 2) -> None:
    """Print what this machine is, and a warning where the project will not run on it, or not as it is meant to."""
    import psutil

    found = gpus()
    for gpu in found:
        print(f"{'GPU':15} {gpu['name']}, memory {gpu['memory']}, compute capability {gpu['capability']}")
    if not found:
        print(f"{'GPU':15} none: the CPU computes, in {processes()} process{'es' if processes() > 1 else ''}")
    print(f"{'CPU':15} {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB of memory")
    print(f"{'disk':15} {shutil.disk_usage(runs_folder()).free / 1e9:.0f} GB free for the run")
    print(f"{'Python':15} {platform.python_version()}")
    if any(gpu["capability"].startswith("6.") for gpu in found):
        print("warning: current builds of PyTorch have no code for a P100: choose the accelerator GPU T4 x2")
    elif found and os.environ.get("GPU_SHARES"):
        print(f"{'GPU_SHARES':15} {os.environ['GPU_SHARES']} processes share a GPU")
    elif found and len(found) < wanted_gpus:
        print(f"warning: {len(found)} GPU, and this notebook is about {wanted_gpus}: choose the accelerator GPU T4 x2")


def use_secrets(*names: str) -> None:
    """Take from Kaggle's secrets what the environment does not have; say which are there, never their values."""
    for name in names:
        if not os.environ.get(name):
            try:
                from kaggle_secrets import UserSecretsClient

                os.environ[name] = UserSecretsClient().get_secret(name)
            except Exception:  # not on Kaggle, no such secret, no internet: its client has an error for each
                os.environ.pop(name, None)
        print(f"{name:15} {'is set' if os.environ.get(name) else 'is not set'}")


def runs_folder() -> Path:
    """Where runs lie: on Kaggle the large disk, of which nothing is kept when the session ends (`keep` copies)."""
    folder = KAGGLE / "temp" / "runs" if (KAGGLE / "working").is_dir() else REPOSITORY / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def earlier_checkpoint(project: str, run: Path) -> list[str]:
    """The setting that resumes from what an earlier session kept and was attached as input to this one; else none.

    Where `run` has checkpoints of its own, this session has gone on already: by itself, the run takes the newest.
    """
    if any((run / "checkpoints").glob("step-*")):
        return []
    found = sorted((KAGGLE / "input").glob(f"**/{project}/checkpoints/step-*"), key=lambda path: path.name)
    return [f"checkpoint.resume={found[-1]}"] if found else []


def launch(project: str, config: str, *settings: str) -> None:
    """Start the project's launch.sh and show what it prints. Of equal keys in `settings` the last one counts.

    Before that, what the run needs and what this machine has (`tools/plan.py`). Raises `CellFailed` if that is too
    little, and if the training fails.
    """
    _show([sys.executable, "-m", "tools.plan", project, "--config", config, *settings])
    _show([f"{project}/launch.sh", "--config", config, *settings])


def evaluate(project: str, config: str, *settings: str) -> None:
    """Start the project's eval.py on all GPUs, or on two CPU processes; `settings` and errors as in `launch`."""
    launcher = [sys.executable, "-m", "launchers.torchrun", "--standalone", "--nproc_per_node", str(processes())]
    share = ["launchers/gpu_share.py"] if gpus() and os.environ.get("GPU_SHARES") else []
    _show([*launcher, *share, f"{project}/eval.py", "--config", config, *settings], quiet=True)


def _show(command: list[str], quiet: bool = False) -> None:
    """Run `command`: a progress bar stays in one place; lines are printed, if `quiet` only where the command fails."""
    from IPython.display import display

    if len(folders := [word for word in command if word.startswith("output_dir=")]) > 1:
        raise CellFailed(f"{folders[-1]} in SETTINGS: set RUN in its place, which the cells below read too")
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PROGRESS": "bar"}  # read from a pipe, and shown in one place
    environment.pop("MPLBACKEND", None)  # the notebook's own, which another environment does not have
    for name, first in (("PATH", Path(sys.executable).parent), ("PYTHONPATH", REPOSITORY)):
        environment[name] = os.pathsep.join([str(first), *filter(None, [environment.get(name)])])
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    bar, printed, began = None, [], time.monotonic()
    # Where the cell is interrupted, the launcher got the signal too, and what it says from then on is wanted.
    interrupted = signal.signal(signal.SIGINT, lambda *_: print("stopping: the run saves a checkpoint ...", flush=True))
    try:
        for line, is_complete in _lines(process):
            if not line.strip() and not (is_complete and printed and printed[-1]):
                continue  # a bar was taken away; or a gap is there already
            if not is_complete:
                shown = {"text/plain": line}
                if bar is None:
                    bar = display(shown, raw=True, display_id=True)
                else:
                    bar.update(shown, raw=True)
            elif not BAR.search(line):  # a bar's last state stands already
                printed.append(line)
                if not quiet:
                    print(line, flush=True)
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, interrupted)
    if code:
        if quiet:
            print(*printed, sep="\n")
        errors = [line for line in printed if line.startswith("error:")]
        raise CellFailed(errors[-1] if errors else f"{command[0]} ended with exit code {code}: see above")
    if quiet and bar is not None:
        bar.update({"text/plain": f"done in {time.monotonic() - began:.0f} s"}, raw=True)


def _lines(process: subprocess.Popen) -> Iterator[tuple[str, bool]]:
    """Each line that `process` prints, and whether it is complete: one that will be overwritten is not."""
    decode, text = codecs.getincrementaldecoder("utf-8")("replace").decode, ""
    while chunk := os.read(process.stdout.fileno(), 65536):  # type: ignore[union-attr]
        *ended, text = re.split(r"(?<=[\r\n])", text + decode(chunk).replace("\r\n", "\n"))
        for line in ended:
            yield line[:-1], line.endswith("\n")
    if text:
        yield text, True


def show_figure(path: str) -> None:
    """A drawing of the repository's, no wider than the page."""
    from IPython.display import SVG, display

    drawing = (REPOSITORY / path).read_text(encoding="utf-8")
    width, height = re.findall(r'<svg [^>]*?width="(\d+)" height="(\d+)"', drawing)[0]
    smaller = f'width="{PAGE_WIDTH}" height="{int(height) * PAGE_WIDTH // int(width)}"'  # its viewBox scales it
    display(SVG(data=drawing.replace(f'width="{width}" height="{height}"', smaller, 1)))


def show_code(*places: str) -> None:
    """Code of the repository, each place a file and a function of it, or a file and a key of a YAML file."""
    from IPython.display import Markdown, display

    from tools.results import code_block

    for place in places:
        display(Markdown(code_block(place, REPOSITORY)))


def show_versions(run: Path) -> None:
    """Those that trained, where the project has an environment of its own."""
    environment = json.loads((run / "environment.json").read_text())
    for name, version in (environment["versions"] | {"Python": environment["python"]}).items():
        print(f"{name:15} {version}")


def describe_run(run: Path) -> str:
    """What the run was, in Markdown: model and weights, data, hardware, date, revision of the code."""
    import yaml

    from common import report

    made = max(
        (path for name in ("environment.json", "eval.json") if (path := run / name).is_file()),
        key=lambda path: path.stat().st_mtime,
    )
    there, settings = report.read_json(made), run / "config.yaml"
    config = yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    at_random = config.get("model", {}).get("random_weights", False)
    if made.name == "eval.json":  # whose training may have been in another session
        model, data = there["base"]["model"], there["settings"]["data"]
        there = there["environment"]
    else:
        model, data = config["model"]["name"], config["data"]["name"]
    weights = "random" if at_random or model.startswith("tiny:") else "published"
    revision = (there["git_commit"] or "unknown").partition(" ")
    return (
        f"*Outputs: `{Path(model).name}` ({weights} weights) on `{Path(data).name}`, "
        f"{there['precision'].partition(':')[0]}; {report.devices(there)}, torch "
        f"{there['versions']['torch']}; {datetime.date.fromtimestamp(made.stat().st_mtime)}, code of "
        f"{revision[0][:10]}{' ' + revision[2] if revision[2] else ''}.*"
    )


def show_plots(run: Path, *names: str) -> None:
    """The run's plots, those of `names` that were drawn; neighbours of one size two by two, in one picture."""
    from IPython.display import Image, display
    from PIL import Image as Picture

    paths = [path for name in names if (path := run / "plots" / f"{name}.png").is_file()]
    for (width, height), same in itertools.groupby(paths, key=lambda path: Picture.open(path).size):
        group = list(same)
        columns = min(2, len(group))
        sheet = Picture.new("RGB", (columns * width, -(-len(group) // columns) * height), "white")
        for i, path in enumerate(group):
            sheet.paste(Picture.open(path), (i % columns * width, i // columns * height))
        small = io.BytesIO()
        few_colours(sheet).save(small, "PNG", optimize=True)  # a third of the bytes, for the notebook's file
        title = ", ".join(path.stem for path in group)
        display(Image(data=small.getvalue(), width=min(sheet.width * 3 // 4, PAGE_WIDTH), alt=f"{title} of the run"))


def few_colours(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture in the plots' own colours and their mixtures with white.

    A palette that is chosen by how much of the picture a colour fills gives two thin lines one colour.
    """
    from PIL import Image, ImageColor

    from common.plots import COLOURS

    steps = 18  # Pillow looks colours up in a grid of four levels: closer ones would be taken for each other
    shades = [
        255 + (level - 255) * step // (steps - 1)
        for colour in COLOURS
        for step in range(steps)
        for level in ImageColor.getrgb(colour)
    ]
    palette = Image.new("P", (1, 1))
    palette.putpalette(shades)
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


def show_measured(project: str) -> None:
    """What was measured on other settings: the tables of the project's README, from the records in results/."""
    from IPython.display import Markdown, display

    from tools.results import tables

    measured = tables(project, REPOSITORY / "results")
    for table in measured:
        display(Markdown(table))
    if not measured:
        print("No table yet: the project's README says what was measured so far.")


def keep(run: Path, project: str) -> None:
    """Say what the run left. On Kaggle, copy what the session keeps: the model, or a checkpoint to resume from."""
    summary = run / "summary.json"  # an evaluation of another session's model leaves none
    completed = not summary.exists() or json.loads(summary.read_text())["status"] == "completed"
    target = run
    if (KAGGLE / "working").is_dir():
        target = KAGGLE / "working" / project
        checkpoints = sorted((run / "checkpoints").glob("step-*"))[-1:]
        _copy(run, target, [*RECORDS, *(["model"] if completed else [f"checkpoints/{p.name}" for p in checkpoints])])
    for path in sorted(path for path in target.iterdir() if not path.name.startswith(".")):
        print(f"{math.ceil(size(path) / 1e5) / 10:9,.1f} MB  {path.name}")  # rounded up, as du does
    print(f"in {target}")
    if not completed and target == run:
        print("The run is not complete: run the training cell again to resume it.")
    elif not completed and (target / "checkpoints").is_dir():
        print("The run is not complete. Save this version, attach its output as input to the next, and run all again.")
    elif not completed:
        print("The run is not complete, and its checkpoint is too large to keep: finish training in this session.")


def _copy(run: Path, target: Path, names: list[str]) -> None:
    there = [run / name for name in names if (run / name).exists()]
    total = sum(map(size, there))
    if total > KAGGLE_KEEPS_GB * 1e9:
        raise CellFailed(
            f"{total / 1e9:.1f} GB are more than the {KAGGLE_KEEPS_GB} that Kaggle keeps: until the session ends, they "
            f"are in {run}"
        )
    shutil.rmtree(target, ignore_errors=True)
    for path in there:
        copy = target / path.relative_to(run)
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


def training_run(project: str, run: Path) -> Path:
    """Where the fine-tuned model and its training's records are: this session's `run`, or one attached as input."""
    attached = sorted((KAGGLE / "input").glob(f"**/{project}/model"))
    return next((path.parent for path in (run / "model", *attached) if path.is_dir()), run)


def find_model(project: str, run: Path, repository: str = "") -> list[str]:
    """The setting that names the fine-tuned model: a Hub repository, this session's run, or one attached as input.

    Raises `CellFailed` where there is none.
    """
    if repository:
        return [f"eval.model={repository}"]
    model = training_run(project, run) / "model"
    if not model.is_dir():
        raise CellFailed(f"no fine-tuned model in {run}: run train.ipynb first, or set MODEL to a Hub repository")
    return [f"eval.model={model}"]


def show_evaluation(run: Path) -> None:
    """Base against fine-tuned: the table and the plot."""
    from IPython.display import Markdown, display

    from common.report import evaluation_rows

    heading, *rest = evaluation_rows(json.loads((run / "eval.json").read_text()))
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rest]
    display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))
    show_plots(run, "eval")


def show_samples(run: Path, count: int) -> None:
    """The first `count` samples: what both models made of them, side by side, each text in one paragraph."""
    from html import escape

    from IPython.display import HTML, display

    samples = json.loads((run / "eval.json").read_text())["samples"][:count]
    if not samples:
        print("none: eval.samples=0")
        return
    columns = list(samples[0])
    style = "text-align: left; vertical-align: top; overflow-wrap: anywhere; width: 25%"
    rows = [[" ".join(sample[column].split()) or "(blank)" for column in columns] for sample in samples]
    head = "".join(f'<th style="{style}">{escape(column.replace("_", "-"))}</th>' for column in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{style}">{escape(text)}</td>' for text in row) + "</tr>" for row in rows
    )
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    display(HTML(f'<table style="table-layout: fixed; width: 100%">{table}</table>'))
