"""What the measuring programs write into a record, and that it names what was measured."""

import json
import runpy
import subprocess
import sys

import launching
import pytest
from conftest import REPOSITORY
from launching import finished_run, metrics

from common import pydoc_data, runtime
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


@pytest.mark.slow
def test_another_librarys_trainer_leaves_the_record_of_a_train_script(cases, tmp_path):
    """As many tokens in each step as ours has, also where an epoch of the rows is shorter than the run."""
    settings = ["data.max_length=64", "data.train_rows=16", "train.max_steps=15", "train.global_batch_size=8",
                "train.micro_batch_size=2", "train.learning_rate=1e-4", "tracking.backend=none"]  # fmt: skip
    launcher = [launching.PYTHON, "-m", "launchers.torchrun", "--standalone", "--nproc_per_node=2"]
    peer = ["bench/peers/train.py", "peer.trainer=transformers", *settings, f"output_dir={tmp_path / 'peer'}"]
    subprocess.run([*launcher, *peer], cwd=REPOSITORY, env=launching.environment(), check=True, capture_output=True)
    ours = finished_run("pytorch-ddp", *settings, "data.format=text", "data.packing=wrapped", "eval.every=0")
    steps, our_steps = metrics(tmp_path / "peer"), [step for step in metrics(ours) if "loss" in step]
    assert [step["tokens"] for step in steps] == [step["tokens"] for step in our_steps] == [8 * 64] * 15
    assert len(cases.windows(steps)) == 5
    assert steps[0]["loss"] == pytest.approx(our_steps[0]["loss"], rel=0.02)


# Processes on the CPU stand in for the GPUs that the program asks for.
WITHOUT_GPUS = """
import runpy, sys, torch
torch.cuda.device_count = lambda: 2
sys.path.insert(0, "bench")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_packing_is_measured_from_the_command_line_to_the_table(tmp_path):
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "packing"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pydoc_data.rows()[:600]))
    names = ("padded", "documents")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GPUS, "bench/packing.py", "--model", "tiny:qwen2", "--text", str(rows),
         "--results", str(folder), "--dirty", "--only", *(f"t4-pytorch-ddp-{name}" for name in names),
         "--set", "train.precision=fp32", "data.max_length=128", "train.global_batch_size=8",
         "train.micro_batch_size=4", "train.max_steps=10", "runtime.allow_cpu=true"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    padded, packed = (json.loads((folder / f"t4-pytorch-ddp-{name}.json").read_text()) for name in names)
    assert padded["filled"] < 0.9 < packed["filled"] <= 1 and packed["tokens"] > padded["tokens"]
    assert packed["windows"] and packed["command"].startswith("torchrun --nproc_per_node 2 bench/as_t4.py pytorch-ddp/")

    for project in ("pytorch-ddp", "pytorch-fsdp"):
        for name in results.PACKINGS:
            record = packed if name == "documents" else padded
            record["environment"]["gpus"] = [{"name": "T4"}] * 2
            record["summary"]["peak_gpu_gib"] = 9.5
            record |= {"project": project, "windows": [len(name) * 100.0] * 5}
            (folder / f"t4-{project}-{name}.json").write_text(json.dumps(record))
    table = results.block("packing t4", tmp_path)
    cells = [cell.strip() for cell in next(x for x in table.splitlines() if "`documents`" in x).strip("|").split("|")]
    assert cells[1:] == ["8/4", "900", "1.50×", f"{packed['filled']:.1%}", "9.5"] and "14.7 GiB" in table
    assert results.block("packing bf16", tmp_path) == results.block("packing loss", tmp_path) == "\n"
