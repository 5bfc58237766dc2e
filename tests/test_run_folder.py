"""The run folder: what a run prints, folders that are links, and a disk that is full."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import environment

from common import progress
from common.checkpoints import Checkpoints
from common.config import BaseConfig, ModelConfig
from common.files import remove, write_whole
from common.models import load_model
from common.run_folder import RunFolder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_model(ModelConfig("tiny:qwen2"))


def train(folder: Path, model, steps: int, resume: str = "auto", before=lambda moment: None) -> None:
    """A run as a train.py makes it, with a checkpoint after every step, two of which are kept, and an export.

    `before` is called with each moment at which something is written.
    """
    cfg = BaseConfig(output_dir=str(folder))
    cfg.checkpoint.resume = resume
    with RunFolder(cfg, "pytorch-ddp", True, {"world_size": 1, "precision": "fp32: as set"}) as run:
        before("begin")
        checkpoints = Checkpoints(run.checkpoints, 2, {})
        first_step, found = checkpoints.find(resume) or (0, None)
        run.begin(model, CPU, torch.float32, first_step, steps, found)
        for step in range(first_step + 1, steps + 1):
            before(f"step {step}")
            run.log_step(step, seconds=0.5, tokens=1000, epoch=1.0, loss=2.0, learning_rate=0.1, grad_norm=1.0)
            checkpoints.begin(step)
            before(f"checkpoint {step}")
            torch.save({"model": torch.rand(100_000)}, checkpoints.writing(step) / "training.pt")
            before(f"manifest {step}")
            checkpoints.commit(step)
        before("export")
        run.save_model(model)
        before("end")
        run.finish("completed")


def test_start_up_is_measured_by_phase_up_to_the_first_step(model, tmp_path, capsys):
    rows = {"rows": 1, "kept": 1, "dropped": {}, "cut": {}}
    step = {"seconds": 0.5, "tokens": 1000, "epoch": 1.0, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0}
    environment = {"world_size": 1, "started_at": time.time() - 5}  # the launcher and the imports took so long
    with RunFolder(BaseConfig(output_dir=str(tmp_path)), "pytorch-ddp", True, environment) as run:
        time.sleep(0.2)
        run.log_rows({"training": rows, "held_out": rows})
        time.sleep(0.4)
        run.begin(model, CPU, torch.float32, 0, 2, None)
        run.log_evaluation(0, 3.0)
        time.sleep(0.6)
        run.log_step(1, **step)
        time.sleep(0.3)
        run.log_step(2, **step)
        run.finish("completed")
    startup = json.loads((tmp_path / "summary.json").read_text())["startup"]
    assert list(startup) == ["imports", "data", "model", "first_step", "total"]
    for phase, least in (("imports", 5.0), ("data", 0.2), ("model", 0.4), ("first_step", 0.6)):
        assert least <= startup[phase] < least + 1, phase
    assert startup["total"] == pytest.approx(sum(list(startup.values())[:-1]), abs=0.05)
    phases = "imports {imports:.1f}, data {data:.1f}, model {model:.1f}, first step {first_step:.1f}".format(**startup)
    assert f"{startup['total']:.1f} s: {phases}" in capsys.readouterr().out


# --- what it prints

T4 = {"name": "Tesla T4", "memory_gib": 14.7}
DEVICES = {
    "two GPUs": ({"world_size": 2, "gpus": [T4, T4]}, "2 × Tesla T4 (14.7 GiB)", "2 ranks × 2 per micro-batch × 4"),
    "shares of one": (
        {"world_size": 4, "gpus": [T4], "gpu_share": "1/4 of GPU 0"},
        "4 × 1/4 of Tesla T4 (14.7 GiB)",
        "4 ranks × 2 per micro-batch × 2",
    ),
    "no GPU": ({"world_size": 1, "gpus": []}, "1 CPU process", "1 rank × 2 per micro-batch × 8"),
    "a pipeline": (
        {"world_size": 4, "gpus": [T4] * 4, "pipeline": {"pipelines": 2}},
        "4 × Tesla T4 (14.7 GiB)",
        "2 pipelines × 2 per micro-batch × 4",
    ),
}


@pytest.mark.parametrize("which", DEVICES)
def test_a_banner_says_what_is_trained_and_how(model, tmp_path, capsys, which):
    described, devices, batch = DEVICES[which]
    cfg = BaseConfig(output_dir=str(tmp_path / "run"))
    cfg.train.micro_batch_size = 2
    with RunFolder(cfg, "pytorch-ddp", True, described | {"precision": "fp16: as set"}) as run:
        device = CPU if which == "no GPU" else torch.device("cuda")
        run._print_banner(model, device, 1234)
    lines = dict(re.findall(r"^  (\w+) +(.*)$", capsys.readouterr().out, re.MULTILINE))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert lines == {
        "model": f"tiny:qwen2, {parameters:.1f} million parameters",
        "data": "pydoc, text, up to 256 tokens",
        "precision": "fp16: as set",
        "devices": devices,
        "batch": f"16 sequences = {batch} accumulation steps",
        "steps": "1,234",
        "folder": str(tmp_path / "run"),
    }


def test_a_run_without_steps_left_has_one_line(model, tmp_path, capsys):
    train(tmp_path, model, 2)
    assert "batch" in capsys.readouterr().out
    train(tmp_path, model, 2)
    out = capsys.readouterr().out
    assert "This run is complete: step 2 of 2. To train on, set train.max_steps higher" in out
    assert "million parameters" not in out


def test_lines_with_the_time_left_where_there_is_no_terminal(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    steps = progress.Progress("Training", "step", 1000, done=400)
    for step in range(401, 1001):
        now[0] += 30 if step == 401 else 0.5  # the first one compiles
        steps.update(f"loss {step}")
        if step == 500:
            steps.write("Step 500: held-out loss 2.0000")
    steps.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Training: 40% (401 of 1,000 steps), loss 401"
    assert lines[1] == "Training: 41% (411 of 1,000 steps), loss 411, 04:54 left"  # 589 steps of half a second
    assert "Step 500: held-out loss 2.0000" in lines
    assert lines[-1] == "Training: 100% (1,000 of 1,000 steps), loss 1000"
    assert len(lines) == 62  # one for each five seconds, the first, the last and the loss


def test_a_short_loop_that_is_not_kept_prints_nothing(capsys):
    assert list(progress.track("abc", "answers", "batch", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal_and_for_a_notebook():
    command = [sys.executable, "-c", "from common.progress import track; list(track(range(3), 'answers', 'batch', 3))"]
    ours, theirs = pty.openpty()
    subprocess.run(command, env=environment(), stdout=theirs, check=True)
    os.set_blocking(ours, False)
    on_a_terminal = os.read(ours, 10_000)
    os.close(ours)
    os.close(theirs)
    in_a_notebook = subprocess.run(command, env=environment(PROGRESS="bar"), stdout=subprocess.PIPE, check=True).stdout
    for shown in (on_a_terminal, in_a_notebook):
        assert shown.count(b"\r") > 1 and b"answers: " in shown and b"0/3" in shown


# --- links


def model_is_whole(folder: Path) -> bool:
    return {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("linked", ["checkpoints", "model", "plots"])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_of_the_run_may_be_a_link(model, tmp_path, linked, resume):
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    run.mkdir()
    (run / linked).symlink_to(disk / linked)
    if linked != "model":  # that one may also lead to nothing yet
        (disk / linked).mkdir()
    for steps in (3, 5):
        train(run, model, steps, resume)
        assert (run / linked).is_symlink() and (disk / linked).is_dir()
        kept = [f"step-{step:08d}" for step in (steps - 1, steps)]
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == kept
        assert model_is_whole(run / "model")
        assert (run / "plots/loss.png").is_file()
    assert not list(disk.glob(".*")) and not list(run.glob(".writing*"))


def test_a_checkpoint_that_was_moved_and_linked_is_only_unlinked(model, tmp_path):
    train(tmp_path / "run", model, 2)
    moved = shutil.move(tmp_path / "run/checkpoints/step-00000001", tmp_path / "moved")
    (tmp_path / "run/checkpoints/step-00000001").symlink_to(moved)
    train(tmp_path / "run", model, 4)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    assert {p.name for p in Path(moved).iterdir()} == {"manifest.json", "training.pt"}


def test_files_that_are_links_are_written_through(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "file.json")
    write_whole(tmp_path / "link.json", "{}")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "file.json").read_text() == "{}"
    remove(tmp_path / "link.json")
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    remove(tmp_path / "nothing")


# --- a full disk

MOMENTS = ["begin", "step 3", "checkpoint 3", "manifest 3", "export", "end"]
# Runs on a small disk of its own, which is full from one moment on. argv: that disk's folder, then the moments.
SCRIPT = """
import contextlib, gc, io, json, shutil, sys
gc.disable()  # imports are quicker
from pathlib import Path
from test_run_folder import train
from common.config import ModelConfig
from common.errors import UserError
from common.models import load_model

disk, model = Path(sys.argv[1]), load_model(ModelConfig("tiny:qwen2"))

def fill(at):
    def before(moment):
        if moment == at:
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                for size in (2**16, 2**12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)): pass
    return before

found, run, begun = {}, disk / "run", f"{disk}-begun"
train(run, model, 2)
shutil.move(run, begun)
for moment in sys.argv[2:]:
    shutil.copytree(begun, run)
    error = None
    try:
        train(run, model, 4, before=fill(moment))
    except UserError as raised:
        error = str(raised)
    files = {str(p.relative_to(run)): p.stat().st_size for p in sorted(run.rglob("*")) if p.is_file()}
    metrics = (run / "metrics.jsonl").read_text()
    for file in run.glob("*.json"):
        json.loads(file.read_text())
    (disk / "filler").unlink()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(run, model, 4)
    status = json.loads((run / "summary.json").read_text())["status"]
    found[moment] = [error, files, metrics, printed.getvalue(), status]
    shutil.rmtree(run)
print("found", json.dumps(found))
"""


@pytest.fixture(scope="module")
def on_a_full_disk(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("disk")
    (folder / "script.py").write_text(SCRIPT)
    mount = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []), "bash", "-c"]
    inside = 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"'
    if subprocess.run([*mount, inside, folder / "..", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    small = tmp_path_factory.mktemp("small")
    command = [sys.executable, str(folder / "script.py"), str(small), *MOMENTS]
    path = f"{Path(__file__).parent}:{Path(__file__).parent.parent}"
    done = subprocess.run(
        [*mount, inside, small, *command], env=environment(PYTHONPATH=path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.rpartition("found ")[2])


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_is_one_line_and_leaves_whole_files(on_a_full_disk, moment):
    error, files, metrics, printed, status = on_a_full_disk[moment]
    if moment != "end" or error:
        before_training = moment == "begin"  # the room is measured there
        expected = (
            ("0 MiB are free", "make room") if before_training else ("no space left to write", "of 17 MB are free")
        )
        assert all(part in error for part in (*expected, "output_dir")) and "\n" not in error
    assert not [name for name in files if "partial" in name or ".writing" in name]
    assert all(json.loads(line) for line in metrics.splitlines()) and metrics.endswith("\n")
    whole = {name.split("/")[1] for name in files if name.startswith("checkpoints/")}
    assert whole == {"step-00000003", "step-00000004"} if moment in ("export", "end") else whole >= {"step-00000002"}
    # With room again, the same command completes what the full disk ended.
    assert status == "completed"
    assert ("damaged" not in printed) and ("Resuming from" in printed or "is complete" in printed)
