"""What the measuring programs write into a record, and that it names what was measured."""

import runpy
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from common import runtime
from tools import results


@pytest.fixture(scope="module")
def cases():
    sys.path.insert(0, str(REPOSITORY / "bench"))
    import cases

    sys.path.remove(str(REPOSITORY / "bench"))
    return cases


def step(tokens, seconds):
    return {"loss": 1.0, "tokens": tokens, "step_seconds": seconds}


def test_windows_leave_out_the_warm_up_and_what_does_not_fill_one(cases):
    slow, held_out = [step(1, 9.0)] * 5, {"step": 5, "eval_loss": 1.0}
    steps = [*slow, held_out, *(step(100, seconds) for seconds in (1, 1, 2, 2, 1, 4, 1, 1, 1, 1)), step(1, 9.0)]
    assert cases.windows(steps) == [100.0, 50.0, 40.0, 100.0, 100.0]
    assert cases.windows([*slow, *[step(1, 1.0)] * 4]) == []


def record(**more):
    return {"environment": {"git_commit": "0123456789abcdef"},
            "summary": {"status": "completed", "tokens_per_second": 80.0}} | more  # fmt: skip


def test_a_speed_is_the_median_of_the_windows_and_the_caption_says_how_far_they_differ():
    timed = record(windows=[100.0, 50.0, 40.0, 101.0, 100.0], measured_by="python bench/ddp.py --only speed")
    assert results.tokens_per_second(timed) == "100" and results.tokens_per_second(record()) == "80"
    caption = results.provenance([timed, timed | {"windows": [10.0, 10.0, 10.0, 10.0, 11.0]}])
    assert caption.startswith("Commit 0123456789. Medians of 5 windows, which differ by 61.0% at most.")
    assert caption.endswith(" Made by `python bench/ddp.py --only speed`.")
    changed = {"environment": {"git_commit": "0123456789abcdef with local changes"}}
    assert results.provenance([record(), changed]) == "Commit 0123456789, with local changes."


def test_nothing_is_measured_with_local_changes_but_on_request(cases, tmp_path, monkeypatch):
    subprocess.run(["git", "clone", "-q", "--shared", str(REPOSITORY), str(tmp_path)], check=True)
    monkeypatch.setattr(runtime, "REPOSITORY", tmp_path)

    def error_of(*options):
        words = ["--only", "speed-2gpu", "--results", str(tmp_path / "results/pytorch-ddp"), *options]
        monkeypatch.setattr(sys, "argv", ["ddp.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "bench/ddp.py"), run_name="__main__")
        return ended.value.code

    (tmp_path / "results/pytorch-ddp/speed-1gpu.json").write_text("{}")  # what an earlier case of the same call wrote
    assert error_of().startswith("error: these cases need 2 GPUs")
    (tmp_path / "pytorch-ddp/train.py").write_text("")
    assert "commit them first, or add --dirty" in error_of()
    assert error_of("--dirty").startswith("error: these cases need 2 GPUs")
