"""Checkpoint folders: one that exists is whole, and a damaged one is passed over with a word about it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, refused

from common.checkpoints import IDENTITY, MANIFEST, Checkpoints, damage, identity
from common.config import BaseConfig, get

ID = identity(BaseConfig(), "a-project", "tiny", "0123abcd")


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=3, identity=ID)


def write(checkpoints: Checkpoints, *steps: int) -> None:
    """As two ranks write: the state, and a file of each rank in a folder of its own."""
    for step in steps:
        checkpoints.begin(step)
        folder = checkpoints.writing(step)
        torch.save({"step": step, "weights": torch.arange(100.0)}, folder / "training.pt")
        for rank in (0, 1):
            (folder / "ranks").mkdir(exist_ok=True)
            torch.save(torch.get_rng_state(), folder / "ranks" / f"rng-{rank}.pt")
        checkpoints.commit(step)


def steps_on_disk(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in checkpoints.root.glob("step-*"))


def test_a_committed_checkpoint_is_found_and_holds_what_was_written(checkpoints):
    assert checkpoints.find("auto") is None, "no folder yet"
    write(checkpoints, 20)
    step, folder = checkpoints.find("auto")
    assert (step, folder) == (20, checkpoints.root / "step-00000020")
    assert damage(folder) is None
    assert torch.load(folder / "training.pt", weights_only=True)["step"] == 20
    assert (folder / "ranks" / "rng-1.pt").is_file()
    assert checkpoints.find("never") is None
    assert not list(checkpoints.root.glob(".writing-*"))


def test_a_writer_killed_between_begin_and_commit_leaves_nothing_that_counts(checkpoints):
    write(checkpoints, 10)
    code = f"""
import os, pathlib, signal
from common.checkpoints import Checkpoints
writer = Checkpoints(pathlib.Path({str(checkpoints.root)!r}), 3, {{}})
writer.begin(20)
(writer.writing(20) / "training.pt").write_bytes(b"half of it")
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    leftover = checkpoints.writing(20)
    assert (leftover / "training.pt").read_bytes() == b"half of it"
    assert checkpoints.find("auto")[0] == 10
    assert steps_on_disk(checkpoints) == [10]
    with refused("checkpoint.resume=", f"no readable {MANIFEST}"):
        checkpoints.find(str(leftover))
    write(checkpoints, 15)
    assert not leftover.exists()
    assert checkpoints.find("auto")[0] == 15


def test_the_newest_are_kept(checkpoints):
    write(checkpoints, 5, 10, 15, 20, 100_000_000)  # a step of more digits than the folder's name has by default
    assert steps_on_disk(checkpoints) == [15, 20, 100_000_000]
    assert checkpoints.find("auto")[0] == 100_000_000
    one = Checkpoints(checkpoints.root, keep=1, identity=ID)
    write(one, 100_000_001)
    assert steps_on_disk(one) == [100_000_001]


def test_a_step_that_is_written_again_replaces_its_checkpoint(checkpoints):
    write(checkpoints, 10)
    (checkpoints.root / "step-00000010" / "extra").touch()
    write(checkpoints, 10)
    assert not (checkpoints.root / "step-00000010" / "extra").exists()
    assert checkpoints.find("auto")[0] == 10


@pytest.mark.parametrize("keep", [1, 3])
def test_a_run_that_took_an_earlier_course_keeps_what_it_writes(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep, ID)
    write(checkpoints, 20, 30)
    write(checkpoints, 5)  # checkpoint.resume=never in the same folder, or resumed from before a damaged one
    assert steps_on_disk(checkpoints) == [5]
    assert checkpoints.find("auto")[0] == 5
    write(checkpoints, 10)
    assert checkpoints.find("auto")[0] == 10


def test_one_that_goes_back_by_a_path_leaves_the_other_course_as_soon_as_it_has_saved(checkpoints):
    write(checkpoints, 4, 8, 12)
    back = Checkpoints(checkpoints.root, keep=3, identity=ID)
    assert back.find(str(back.root / "step-00000004"))[0] == 4
    assert steps_on_disk(back) == [4, 8, 12]  # as long as it has nothing better
    write(back, 20)
    assert steps_on_disk(back) == [4, 20]
    write(back, 24, 28)
    assert steps_on_disk(back) == [20, 24, 28]


def test_one_that_goes_on_from_another_run_leaves_what_was_in_its_folder_as_soon_as_it_has_saved(checkpoints, tmp_path):
    write(checkpoints, 4, 12)
    other = Checkpoints(tmp_path / "other", keep=3, identity=ID)
    write(other, 8)
    run = Checkpoints(checkpoints.root, keep=3, identity=ID)
    assert run.find(str(other.root / "step-00000008"))[0] == 8
    write(run, 10)
    assert steps_on_disk(run) == [10] and steps_on_disk(other) == [8]


def truncate(folder: Path) -> None:
    path = folder / "training.pt"
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (truncate, "training.pt has"),
    "a flipped bit": (lambda folder: flip(folder / "training.pt", -100), "training.pt has another checksum"),
    "a file less": (lambda folder: (folder / "ranks" / "rng-1.pt").unlink(), "rng-1.pt is missing"),
    "an empty file": (lambda folder: (folder / "training.pt").write_bytes(b""), "training.pt has 0 bytes"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"no readable {MANIFEST}"),
    "an empty manifest": (lambda folder: (folder / MANIFEST).write_text(""), f"no readable {MANIFEST}"),
    "another manifest": (lambda folder: (folder / MANIFEST).write_text("[]"), f"no readable {MANIFEST}"),
    "no files at all": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], f"no readable {MANIFEST}"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_one_is_named_and_the_one_before_it_taken(checkpoints, capsys, how):
    write(checkpoints, 10, 20)
    newest = checkpoints.root / "step-00000020"
    inflict, problem = DAMAGES[how]
    inflict(newest)
    assert checkpoints.find("auto")[0] == 10
    warning = capsys.readouterr().err
    assert len(warning.splitlines()) == 1
    assert f"warning: {newest}" in warning
    assert problem in warning
    with refused(f"checkpoint.resume={newest}", problem):
        checkpoints.find(str(newest))


def test_when_all_are_damaged_nothing_starts_over_by_itself(checkpoints, capsys):
    write(checkpoints, 10, 20)
    for folder in checkpoints.root.glob("step-*"):
        truncate(folder)
    with refused(str(checkpoints.root), "checkpoint.resume=never"):
        checkpoints.find("auto")
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert len(list(checkpoints.root.iterdir())) == 2


def test_any_changed_character_of_the_manifest_is_noticed(checkpoints):
    write(checkpoints, 10)
    manifest = checkpoints.root / "step-00000010" / MANIFEST
    whole = manifest.read_bytes()
    for at in range(len(whole)):
        flip(manifest, at)
        if not whole[at : at + 1].isspace():
            assert damage(manifest.parent), f"byte {at}: {whole[at - 20 : at + 20]}"
        manifest.write_bytes(whole)
    assert damage(manifest.parent) is None


def test_an_explicit_path_is_taken_also_from_another_run(checkpoints, tmp_path):
    write(checkpoints, 10, 20)
    older = checkpoints.root / "step-00000010"
    assert checkpoints.find(str(older)) == (10, older)
    elsewhere = tmp_path / "copied"
    shutil.copytree(older, elsewhere)
    assert Checkpoints(tmp_path / "other", 1, ID).find(str(elsewhere)) == (10, elsewhere)
    with refused("checkpoint.resume=", "nowhere", "manifest"):
        checkpoints.find(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("key", ID)
def test_a_checkpoint_of_another_run_is_refused_with_both_values(checkpoints, key):
    write(checkpoints, 10)
    changed = Checkpoints(checkpoints.root, 3, {**ID, key: "something else"})
    folder = checkpoints.root / "step-00000010"
    for resume in ("auto", str(folder)):
        with refused(f"{key} is something else", str(ID[key]), str(folder), "checkpoint.resume=never"):
            changed.find(resume)
    assert changed.find("never") is None


def test_other_data_are_refused_with_what_may_have_changed(checkpoints):
    write(checkpoints, 10)
    changed = Checkpoints(checkpoints.root, 3, {**ID, "the training data's fingerprint": "g"})
    with refused("fingerprint is g", "data.name, another data key or the file itself has changed"):
        changed.find("auto")


def test_identity_is_what_a_run_cannot_change():
    config = BaseConfig()
    before = identity(config, "p", "a", "f")
    assert before["the training data's fingerprint"] == "f"
    assert all(before[key] == get(config, key) for key in IDENTITY)
    config.train.max_steps, config.train.micro_batch_size, config.train.max_grad_norm = 7, 1, 0.5
    config.data.name = "the/same/rows.jsonl"
    assert identity(config, "p", "a", "f") == before, "these may change between two starts"
