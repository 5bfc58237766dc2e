"""The notebooks, executed from top to bottom with the real names against a Hub on this machine; and what they call."""

import ast
import datetime
import html
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import torch
import yaml
from conftest import REPOSITORY, refused
from hub_content import assert_base_is_kept, qwen2
from launching import FOUNDRY, environment, metrics
from nbclient.exceptions import CellExecutionError
from PIL import Image, ImageColor
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.plots import COLOURS
from tools import kaggle, notebook, notebook_files, notebook_record

SOURCES = sorted(REPOSITORY.glob("*/notebooks/*.py"))
PROJECTS = sorted({path.parent.parent.name for path in SOURCES})
PROCESSES = {"deepspeed-offload": 1}  # whose config.yaml is for one GPU
STEPS = {"ray-tune": 53}  # the least with a rung, and with the warm-ups of its space below it
TRIALS = {"ray-tune": ["search.trials=2"]}


def cells(path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_notebook_launches_and_shows_and_defines_nothing(path):
    sources = cells(path.with_suffix(".ipynb"))
    assert len(sources) >= 5
    for code in sources:
        assert len(code.splitlines()) <= 25 and not code.lstrip().startswith(("!", "%"))
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, kinds)]
    folder = path.parent / path.stem
    metadata = json.loads((folder / "kernel-metadata.json").read_text())
    assert (folder / metadata["code_file"]).resolve() == path.with_suffix(".ipynb")
    assert metadata["machine_shape"] == "NvidiaTeslaT4" and metadata["enable_internet"]  # that is two T4


def test_the_files_are_those_of_their_sources(tmp_path):
    notebook_files.update(REPOSITORY, check=True)
    folder = tmp_path / "pytorch-ddp/notebooks"
    folder.mkdir(parents=True)
    source = (REPOSITORY / "pytorch-ddp/notebooks/train.py").read_text()
    (folder / "train.py").write_text(source)
    settings = (REPOSITORY / "pyproject.toml").read_text().replace("OWNER", "somebody")
    (tmp_path / "pyproject.toml").write_text(settings)
    with refused("train.ipynb", "kernel-metadata.json", "make notebooks"):
        notebook_files.update(tmp_path, check=True)
    notebook_files.update(tmp_path, check=False, revision="v1")
    notebook_files.update(tmp_path, check=True)
    made = (folder / "train.ipynb").read_text()
    assert "github.com/somebody/" in made and "OWNER" not in made and 'REVISION = \\"v1\\"' in made

    # Only pyproject.toml names the owner; Kaggle's may be another one.
    metadata = folder / "train/kernel-metadata.json"
    assert json.loads(metadata.read_text())["id"] == "somebody/pytorch-ddp-train"
    (tmp_path / "CITATION.cff").write_text('repository-code: "https://example.org/a/b"\n')
    (tmp_path / "pyproject.toml").write_text(settings.replace("# kaggle = ", "kaggle = "))
    with refused("CITATION.cff", "kernel-metadata.json"):
        notebook_files.update(tmp_path, check=True)
    notebook_files.update(tmp_path, check=False)
    assert json.loads(metadata.read_text())["id"] == "account/pytorch-ddp-train"
    address = kaggle.origin(tmp_path)[0]
    assert (tmp_path / "CITATION.cff").read_text() == f'repository-code: "{address}"\n'
    assert address == "https://github.com/somebody/multi-gpu-fine-tuning"

    # Outputs stay with the cells whose code stays.
    with_outputs = nbformat.read(folder / "train.ipynb", 4)
    for cell in with_outputs.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text="seen")]
    nbformat.write(with_outputs, folder / "train.ipynb")
    text = (folder / "train.py").read_text()
    (folder / "train.py").write_text(text.replace("SETTINGS = []", 'SETTINGS = ["seed=1"]'))
    notebook_files.update(tmp_path, check=False)
    code = [cell for cell in nbformat.read(folder / "train.ipynb", 4).cells if cell.cell_type == "code"]
    assert [bool(cell.outputs) for cell in code] == ["seed=1" not in cell.source for cell in code]
    assert not all(cell.outputs for cell in code)
    notebook_files.update(tmp_path, check=False, revision="v2")
    assert [cell.outputs for cell in nbformat.read(folder / "train.ipynb", 4).cells if cell.cell_type == "code"] == [
        cell.outputs for cell in code
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_outputs_are_those_of_a_whole_run_and_name_nothing_of_its_machine(path):
    assert path.with_suffix(".ipynb").stat().st_size < 400_000
    code = [cell for cell in nbformat.read(path.with_suffix(".ipynb"), 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code)
    texts = [text for cell in code for output in cell.outputs for text in texts_of(output)]
    for wanted in ("torch  ", "GPU  ", "Python  ", notebook_record.SHOWN):
        assert any(wanted in text for text in texts), wanted
    own = [cell for cell in code if not cell.source.startswith("notebook.show_code(")]  # that is from the files
    for text in (text for cell in own for output in cell.outputs for text in texts_of(output)):
        assert not re.search(r"(?<![\w.:/<])/(?!dev/)\w[\w.-]*/|\bhf_\w{9}|[Tt]raceback|[Ww]arning", text), text
        assert len(text.splitlines()) <= 100 and len(notebook.BAR.findall(text)) <= 1, text


def test_all_notebooks_find_the_code_by_the_same_cell():
    setups = {code for path in SOURCES for code in cells(path.with_suffix(".ipynb")) if "CODE = " in code}
    assert len(setups) == 1


def texts_of(output: nbformat.NotebookNode) -> list[str]:
    """What an output has for a reader, pictures aside."""
    return [output.text] if "text" in output else [v for k, v in output.data.items() if not k.startswith("image/")]


def execute(project: str, kind: str, edits: list[str], folder: Path, **variables: str) -> str:
    """Run all cells of the packed notebook in `folder`, with `edits` below the parameters; what they have shown."""
    kaggle.write(REPOSITORY, folder / "packed", [project], "somebody")
    found = nbformat.read(folder / f"packed/{project}-{kind}/{project}-{kind}.ipynb", 4)
    code = folder / "multi-gpu-fine-tuning"
    if project == FOUNDRY and not code.exists():
        code.mkdir()
        (code / ".venv-foundry").symlink_to((REPOSITORY / ".venv-foundry").resolve())
    notebook_record.execute(found, edits, folder, env=environment(cold=True, **variables))  # a zygote would serve once
    output = shown(found)
    assert f"The code is in {code}" in output
    return output


def shown(found: nbformat.NotebookNode) -> str:
    outputs = [output for cell in found.cells for output in cell.get("outputs", [])]
    return "\n".join(
        output.get("text") or "\n".join(f"{kind}: {value}" for kind, value in output.data.items()) for output in outputs
    )


@pytest.mark.slow
@pytest.mark.parametrize("project", PROJECTS)
def test_the_shipped_configuration_trains_uploads_and_evaluates(hub, tmp_path, project):
    """Only the number of steps, and of trials, is changed; and the newest checkpoint is uploaded too.

    From the packed notebooks, in a folder with nothing of the repository.
    """
    steps = STEPS.get(project, 3)
    processes = PROCESSES.get(project, 2)
    variables = hub.environment(tmp_path / "home", token="hf_writer") | {"NPROC_PER_NODE": str(processes)}
    run = tmp_path / "runs/first"
    settings = [f"train.max_steps={steps}", "hub.push_checkpoints=true", "runtime.allow_cpu=true"]
    settings += TRIALS.get(project, [])
    edits = [f"RUN = Path({str(run)!r})", f"SETTINGS = {settings}"]
    trained = execute(project, "train", [*edits, f'HUB_REPOSITORY = "writer/{project}"'], tmp_path, **variables)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed"
    if project != "llm-foundry-finetune":  # whose first steps of 85 of warm-up to 1e-6 move nothing
        assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert len([record for record in metrics(run) if "loss" in record]) == steps
    assert trained.count("image/png") >= 1 and "image/svg+xml" in trained
    assert f"none: the CPU computes, in {processes} process" in trained
    uploaded, names = hub.root / "models/writer" / project, yaml.safe_load((run / "config.yaml").read_text())
    ids = torch.tensor([AutoTokenizer.from_pretrained(run / "model")("We show that")["input_ids"]])
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits for path in (run / "model", uploaded)
        )
    assert torch.equal(ours, theirs)
    assert_base_is_kept(hub.root / "models" / names["model"]["name"], uploaded)
    assert (uploaded / f"checkpoints/step-{steps:08d}").is_dir()
    card = (uploaded / "README.md").read_text()
    assert names["model"]["name"] in card and names["data"]["name"] in card
    if project == "llm-foundry-finetune":  # the text that a question is about, if it has one, is in the prompt
        rows = [json.loads(line) for line in (run / "foundry/eval.jsonl").read_text().splitlines()]
        with_context = [row for row in rows if row["prompt"].count("\n") > 2 or len(row["prompt"]) > 200]
        assert 0.1 < len(with_context) / len(rows) < 0.5
    if names["tracking"]["backend"] == "wandb":
        assert list((tmp_path / "runs").rglob("*.wandb")), "no offline W&B run"

    evaluated = execute(project, "eval", edits, tmp_path, **variables)
    results = json.loads((run / "eval.json").read_text())
    assert results["base"]["loss"] == pytest.approx(summary["eval_loss_before"], rel=1e-5)
    assert results["fine_tuned"]["loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-5)
    assert f"{results['fine_tuned']['loss']:.4f}" in evaluated and "image/png" in evaluated
    answer = " ".join(results["samples"][0]["fine_tuned"].split())
    assert results["environment"]["world_size"] == processes and html.escape(answer[:10]) in evaluated
    assert "done in" in evaluated and "WARNING" not in trained + evaluated

    # The token is in nothing that was written or shown.
    assert "HF_TOKEN        is set" in trained and "hf_writer" not in trained + evaluated
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 15 and not [path for path in written if b"hf_writer" in path.read_bytes()]


@pytest.mark.slow
def test_an_evaluation_without_a_training_says_which_notebook_to_run(tmp_path):
    with pytest.raises(CellExecutionError, match=r"run train\.ipynb first"):
        execute("pytorch-ddp", "eval", [f"RUN = Path({str(tmp_path / 'run')!r})"], tmp_path)


# As config.yaml's, but small and embedded.
FEW = ["data.name=pydoc", "data.train_rows=99", "data.eval_rows=9", "data.max_length=64"]
SMALL = ["model.name=tiny:qwen2", *FEW]
# Starts a command where / has what it has here, and its second argument as /kaggle; the first is an empty folder.
KAGGLE_MACHINE = """
set -e
mount -t tmpfs none "$0"
for path in /*; do
  if [ -L "$path" ]; then cp -P "$path" "$0"
  elif [ -d "$path" ]; then mkdir "$0$path"; mount --rbind "$path" "$0$path"
  fi
done
mkdir -p "$0/kaggle"; mount --bind "$1" "$0/kaggle"
exec chroot "$0" env -C "$PWD" "${@:2}"
"""
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def alone(kind: str, folder: Path) -> Path:
    """The notebook's source without the repository, as on Kaggle; it fetches this repository's newest commit."""
    source = (REPOSITORY / f"pytorch-ddp/notebooks/{kind}.py").read_text()
    address = notebook_files.ADDRESS.search(source)[1]
    revision = subprocess.run(
        ["git", "-C", REPOSITORY, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}.py").write_text(source.replace(address, str(REPOSITORY)).replace('"main"', f'"{revision}"'))
    return folder / f"{kind}.py"


def packed(kind: str, folder: Path) -> None:
    """The notebook with its code in it, as `make kaggle` writes it, in the form that a recording takes."""
    kaggle.write(REPOSITORY, folder, ["pytorch-ddp"], "somebody")
    notebook = nbformat.read(folder / f"pytorch-ddp-{kind}/pytorch-ddp-{kind}.ipynb", 4)
    jupytext.write(notebook, folder / f"{kind}.py", fmt="py:percent")


def record(path: Path | str, *settings: str, before: list = (), **more: str) -> subprocess.CompletedProcess:
    command = [*before, sys.executable, "-m", "tools.notebook_record", str(path), *settings]
    safe = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    variables = environment(cold=bool(before), **safe, **more)
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True)


@pytest.mark.slow
def test_away_from_the_repository_the_code_is_fetched_and_a_recording_keeps_what_is_shown(tmp_path):
    path = alone("train", tmp_path)
    failed = record(path, "train.max_step=2")
    line = failed.stderr.splitlines()[-1]  # the training's error line fails its cell, and the recording
    assert failed.returncode == 2 and "CellFailed: error: " in line and "max_step" in line, failed
    assert not path.with_suffix(".ipynb").exists()
    done = record(path, *SMALL, "train.max_steps=2", "--remark=beside others")
    assert done.returncode == 0, done
    clone = tmp_path / "multi-gpu-fine-tuning"
    assert json.loads((clone / "runs/pytorch-ddp/summary.json").read_text())["status"] == "completed"
    recorded = nbformat.read(path.with_suffix(".ipynb"), 4)
    title, *sources = (cell.source for cell in recorded.cells)
    written, *others = (cell.source for cell in jupytext.read(path).cells)
    assert sources == others
    heading, _, line, *rest = title.split("\n")
    assert "\n".join([heading, *rest]) == written
    commit = json.loads((clone / "runs/pytorch-ddp/environment.json").read_text())["git_commit"][:10]
    assert (
        line.startswith("*Outputs: `tiny:qwen2` (random weights) on `pydoc`, fp32; ") and "2 CPU processes" in line
    ), line
    assert str(datetime.date.today()) in line and f"code of {commit}" in line and line.endswith("; beside others.*")
    assert "--config config.yaml" in shown(recorded) and "train.max_steps=2" in shown(recorded)
    assert "image/png" in shown(recorded) and f"in {clone}/runs/pytorch-ddp" in shown(recorded)
    assert all(cell.outputs for cell in recorded.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_on_kaggle_a_run_goes_on_in_the_next_session_and_is_evaluated_in_a_third(tmp_path):
    """With a real /kaggle, of which a session gets what an earlier one left in /kaggle/working, and a model as input.

    The notebooks carry their code: there is neither a repository nor one to fetch. Nor is there a Hub."""
    if subprocess.run([*NAMESPACE, "true"]).returncode:
        pytest.skip("this machine permits no mounts of one's own")

    def session(number: int, kind: str, *settings: str) -> tuple[str, Path, Path]:
        kaggle_root = tmp_path / f"session-{number}"
        model = kaggle_root / "input/models/qwen-lm/qwen2/transformers/0.5b-instruct/1"
        model.mkdir(parents=True)
        qwen2(model)
        if number > 1:
            (tmp_path / f"session-{number - 1}/working").rename(kaggle_root / "input/earlier")
        packed(kind, kaggle_root / "working")
        root = tmp_path / "root"
        root.mkdir(exist_ok=True)
        before = [*NAMESPACE, "bash", "-c", KAGGLE_MACHINE, str(root), str(kaggle_root)]
        few = [*FEW, "train.max_steps=4", "runtime.allow_cpu=true", *settings]
        done = record(f"/kaggle/working/{kind}.py", *few, before=before, HF_ENDPOINT="http://127.0.0.1:9")
        assert done.returncode == 0, done
        assert (kaggle_root / "temp/multi-gpu-fine-tuning/tools/notebook.py").is_file()
        output = shown(nbformat.read(kaggle_root / f"working/{kind}.ipynb", 4))
        return output, kaggle_root / "working/pytorch-ddp", kaggle_root / "temp/runs/pytorch-ddp"

    output, kept, _ = session(1, "train", "runtime.max_hours=1e-6")  # over after its first step
    assert "attached: /kaggle/input/models/qwen-lm/qwen2/transformers/0.5b-instruct/1" in output
    assert "attach its output as input" in output and "in /kaggle/working/pytorch-ddp" in output
    assert [path.name for path in (kept / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (kept / "model").exists()

    output, kept, run = session(2, "train")
    assert "Resuming from the checkpoint of step 1" in output
    assert [record["step"] for record in metrics(kept) if "loss" in record] == [1, 2, 3, 4]
    assert "base_model: Qwen/Qwen2-0.5B-Instruct" in (kept / "model/README.md").read_text()
    assert (kept / "model/model.safetensors").is_file() and not (kept / "checkpoints").exists()
    assert (run / "checkpoints/step-00000004").is_dir()  # too large to keep, and not needed

    output, kept, run = session(3, "eval")
    assert {"eval.json", "samples.md", "plots"} <= {path.name for path in kept.iterdir()}
    results = json.loads((run / "eval.json").read_text())
    assert results["fine_tuned"]["model"].endswith("/input/earlier/pytorch-ddp/model")
    assert f"{results['fine_tuned']['loss']:.4f}" in output


def test_a_recording_of_what_is_no_notebook_says_so_in_one_line(tmp_path):
    """Nothing is named, no such file, code that is not a notebook, and a `.ipynb` instead of its source."""
    ipynb = REPOSITORY / "pytorch-ddp/notebooks/train.ipynb"
    unchanged = ipynb.read_bytes()
    for named in ([], [tmp_path / "train.py"], [REPOSITORY / "common/data.py"], [ipynb]):
        command = [sys.executable, "-m", "tools.notebook_record", *map(str, named)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.strip() == (
            f"error: {named[0] if named else REPOSITORY} is not the source of a notebook: "
            "name one, such as pytorch-ddp/notebooks/train.py"
        )
    assert ipynb.read_bytes() == unchanged


def test_an_interrupted_cell_shows_what_the_launcher_says_until_its_end(tmp_path):
    child = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (print("saved", flush=True), sys.exit(130)))
print("ready", flush=True)
time.sleep(60)
"""
    cell = f"import sys; from tools import notebook; notebook._show([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", cell],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)  # as Jupyter does
    output, errors = process.communicate(timeout=60)
    assert sorted(output.splitlines()) == ["saved", "stopping: the run saves a checkpoint ..."]
    assert "CellFailed" in errors and "exit code 130" in errors and "KeyboardInterrupt" not in errors


def test_a_run_folder_in_the_settings_is_refused_for_the_cells_below_read_another():
    with pytest.raises(notebook.CellFailed, match="output_dir=mine in SETTINGS: set RUN"):
        notebook.launch("pytorch-ddp", "smoke.yaml", "output_dir=runs/first", "output_dir=mine")


@pytest.mark.slow
def test_a_run_that_cannot_work_here_is_not_launched(tmp_path, capsys):
    with pytest.raises(
        notebook.CellFailed, match=r"^error: no GPU found.*Settings → Accelerator → GPU T4 x2"
    ) as caught:
        notebook.launch("llm-foundry-finetune", "config.yaml", f"output_dir={tmp_path}/run")
    (line,) = caught.value._render_traceback_()
    assert "\n" not in line and not (tmp_path / "run").exists()
    assert "Building" not in capsys.readouterr().out  # nor is LLM Foundry's environment


def test_only_the_gpus_that_cuda_sees_are_counted(tmp_path, monkeypatch):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nfor i in 0 1; do echo $i, GPU-$i$i$i, Tesla T4, 15360 MiB, 7.5; done\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    for visible, count in ((None, 2), ("0,1", 2), ("1", 1), ("GPU-111", 1), ("", 0)):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        else:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert len(notebook.gpus()) == count and notebook.processes() == (count or 2)
    assert notebook.gpus() == []


def test_plots_of_one_size_are_shown_two_by_two_in_their_own_colours(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    for name, size in (("loss", (840, 525)), ("rate", (840, 525)), ("speed", (840, 525)), ("wide", (1080, 600))):
        picture = Image.effect_noise(size, 40).convert("RGB")  # a busy picture, in which lines are thin
        for number, colour in enumerate(COLOURS):
            picture.paste(colour, (0, 40 * number, size[0], 40 * number + 2))
        (tmp_path / "plots").mkdir(exist_ok=True)
        picture.save(tmp_path / f"plots/{name}.png")
    notebook.show_plots(tmp_path, "loss", "rate", "speed", "missing", "wide")
    sheet, wide = (Image.open(io.BytesIO(image.data)) for image in shown)
    assert sheet.size == (1680, 1050) and wide.size == (1080, 600)
    assert [image.width for image in shown] == [840, 810] and shown[0].alt == "loss, rate, speed of the run"
    for number, colour in enumerate(COLOURS):
        for picture, at in ((sheet, (5, 40 * number)), (sheet, (845, 525 + 40 * number)), (wide, (5, 40 * number))):
            expected = ImageColor.getrgb(colour) if at[0] == 5 else (255, 255, 255)  # three plots: the fourth is blank
            assert picture.convert("RGB").getpixel(at) == expected


def test_an_evaluation_without_samples_shows_none(tmp_path, capsys):
    (tmp_path / "eval.json").write_text('{"samples": []}')
    notebook.show_samples(tmp_path, count=4)
    assert "eval.samples=0" in capsys.readouterr().out


def test_what_a_session_keeps_is_found_by_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebook, "KAGGLE", tmp_path)
    for name in ("working", "input/earlier"):
        (tmp_path / name).mkdir(parents=True)
    run = notebook.runs_folder() / "pytorch-ddp"
    assert run.is_relative_to(tmp_path / "temp")  # of which nothing is kept
    for name in ("checkpoints/step-00000002", "checkpoints/step-00000004", "model"):
        (run / name).mkdir(parents=True)
        (run / name / "file").write_text("x" * 1000)
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "summary.json").write_text('{"status": "interrupted"}')
    assert notebook.earlier_checkpoint("pytorch-ddp", tmp_path / "new") == []
    notebook.keep(run, "pytorch-ddp")
    kept = tmp_path / "working/pytorch-ddp"
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoints", "metrics.jsonl", "summary.json"]
    assert "not complete" in capsys.readouterr().out
    kept.rename(tmp_path / "input/earlier/pytorch-ddp")
    assert notebook.earlier_checkpoint("pytorch-ddp", run) == []  # it has its own
    (setting,) = notebook.earlier_checkpoint("pytorch-ddp", tmp_path / "new")
    assert setting == f"checkpoint.resume={tmp_path}/input/earlier/pytorch-ddp/checkpoints/step-00000004"

    (run / "summary.json").write_text('{"status": "completed"}')
    notebook.keep(run, "pytorch-ddp")
    assert sorted(path.name for path in kept.iterdir()) == ["metrics.jsonl", "model", "summary.json"]
    kept.rename(tmp_path / "input/pytorch-ddp")
    assert notebook.training_run("pytorch-ddp", run) == run  # this session's own comes first
    assert notebook.find_model("pytorch-ddp", tmp_path / "new") == [f"eval.model={tmp_path}/input/pytorch-ddp/model"]
    evaluated = notebook.runs_folder() / "evaluated"  # of another session's model
    evaluated.mkdir()
    (evaluated / "eval.json").write_text("{}")
    capsys.readouterr()
    notebook.keep(evaluated, "pytorch-fsdp")
    assert (tmp_path / "working/pytorch-fsdp/eval.json").is_file() and "not complete" not in capsys.readouterr().out
    search = notebook.runs_folder() / "ray-tune"  # its trials are not a run's checkpoints
    (search / "trials").mkdir(parents=True)
    (search / "summary.json").write_text('{"status": "interrupted"}')
    notebook.keep(search, "ray-tune")
    assert "in this session" in capsys.readouterr().out

    with (run / "model/file").open("ab") as file:
        file.truncate(21 * 10**9)  # takes no space on the disk
    with pytest.raises(notebook.CellFailed, match=rf"21\.0 GB are more than the 20 .* in {run}"):
        notebook.keep(run, "pytorch-ddp")
    assert not (tmp_path / "working/pytorch-ddp").exists()
