"""Does the suite catch faults? Plants one at a time in a copy of the repository, and runs the tests that should fail.

    python tests/plant_faults.py                    # all, with the quick tests first, then the slow ones that are named
    python tests/plant_faults.py mask asha          # those with one of these words in their names
    python tests/plant_faults.py --fast             # the quick tests only: what `make test-fast` would catch

A fault that no test notices is a missing test: write it. A fault whose text is no longer in its file must be updated.
Run it by hand, with the environment of `make test`; it takes about ten seconds for each fault.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    new: str
    tests: str  # files of tests/, without test_ and .py
    slow: str = ""  # a slow test's file and -k expression, for a fault that the quick tests cannot see


FAULTS = [
    Fault("loss mask off by one", "common/loss.py", "shifted = labels[:, 1:].flatten()\n    is_target = (shifted != IGNORE).nonzero().squeeze(1)  #",
          "shifted = labels[:, :-1].flatten()\n    is_target = (shifted != IGNORE).nonzero().squeeze(1)  #", "loss"),
    Fault("loss of the token itself", "common/loss.py", "hidden[:, :-1].flatten(0, 1)", "hidden[:, 1:].flatten(0, 1)", "loss"),
    Fault("first token counted as a target", "common/loss.py", "return int((labels[:, 1:] != IGNORE).sum())",
          "return int((labels != IGNORE).sum())", "loss data"),
    Fault("a loss that differs from the model's is trained", "common/loss.py",
          "if _near(loss, own, 1e-4) and all(map(_near, gradients, own_gradients)):", "if True:", "loss"),
    Fault("schedule one step late after resuming", "common/schedule.py", "first_step - 1", "first_step - 1 - bool(first_step)", "models runtime data ddp checkpoints",
          "ddp -k killed-at-32"),
    Fault("no warm-up", "common/schedule.py", "warmup, last = cfg.train.warmup_steps,", "warmup, last = 0,", "runtime models data tune",
          "foundry -k two_processes_train_and_evaluate"),
    Fault("a damaged checkpoint is accepted", "common/checkpoints.py",
          "if not (problem := damage(folder)):", "if not (problem := None):", "checkpoints"),
    Fault("checksums are not compared", "common/checkpoints.py", "        if found != manifest[\"files\"][name]:",
          "        if False:", "checkpoints"),
    Fault("one checkpoint too many is kept", "common/checkpoints.py", "ours[: self.keep]", "ours[: self.keep + 1]", "checkpoints"),
    Fault("another run's checkpoint is taken up", "common/checkpoints.py", "if theirs != ours:", "if False:", "checkpoints"),
    Fault("a half-written checkpoint is renamed at once", "common/checkpoints.py", "return self.root / f\".writing-{step:08d}\"",
          "return self.root / f\"step-{step:08d}\"", "checkpoints"),
    Fault("the resumed step's record is dropped", "common/json_lines.py", "if r[\"step\"] <= step", "if r[\"step\"] < step", "report run_folder checkpoints",
          "ddp -k killed-at-32"),
    Fault("ASHA keeps the worst", "ray-tune/asha.py", "100 / reduction_factor", "100 - 100 / reduction_factor", "tune"),
    Fault("ASHA compares different steps", "ray-tune/asha.py", "min((step for step in curve if step >= rung), default=None)",
          "max((step for step in curve if step >= rung), default=None)", "tune"),
    Fault("ASHA decides before earlier trials report", "ray-tune/asha.py", "                    pending.update(rungs[i:])",
          "                    pass", "tune"),
    Fault("a password in a message", "common/redaction.py",
          "return _ADDRESS.sub(lambda match: match[1] + _split(match[2])[1], text)", "return text", "tracking console"),
    Fault("EOS is not learned", "common/data.py",
          "return ids if len(ids) > first and ids[-1] == eos else [*ids, eos]", "return ids", "data targets"),
    Fault("prompts are learned", "common/data.py", "is_target = positions >= np.array(targets)[rows]", "is_target = positions >= 0", "data targets"),
    Fault("a changed row trains with the old tokens", "common/data.py",
          '"rows": [_find_split(data, split).digest(data) for split in _splits(data)],', "", "token_cache"),
    Fault("a damaged file of tokens is trained on", "common/token_cache.py",
          'digest_of_file(file) != saved["arrays"][name]', "not file.exists()", "token_cache"),
    Fault("data position one step off after resuming", "common/data.py", "for step in range(self.first_step, self.total_steps):",
          "for step in range(self.first_step + 1, self.total_steps + 1):", "data"),
    Fault("every epoch in the same order", "common/data.py", "np.random.default_rng([self.seed, epoch])",
          "np.random.default_rng([self.seed, 0])", "data"),
    Fault("ranks see the same rows", "common/data.py", "yield batch[self.rank :: self.world_size].tolist()",
          "yield batch[: len(batch) // self.world_size].tolist()", "data"),
    Fault("held-out rows are trained", "common/data.py", "order[: data.eval_rows]), order[data.eval_rows :]",
          "order[: data.eval_rows]), order", "data"),
    Fault("padding is a target", "common/data.py", '"labels": IGNORE, "position_ids"', '"labels": pad_id, "position_ids"', "data"),
    Fault("bits per byte in nats", "common/evaluation.py", "total / math.log(2) / max(text_bytes, 1)", "total / max(text_bytes, 1)", "evaluation"),
    Fault("bf16 on a T4", "common/runtime.py", "name = \"bf16\" if capability >= (8, 0) else \"fp16\"",
          "name = \"bf16\" if capability >= (7, 0) else \"fp16\"", "runtime"),
    Fault("an endless loss is trained on", "common/runtime.py", "if not math.isfinite(loss):", "if False:", "runtime"),
    Fault("torch's random numbers are not restored", "common/runtime.py", "    torch.set_rng_state(state[\"torch\"])\n", "", "runtime"),
    Fault("an unknown key is accepted", "common/config.py", "            raise UserError(f\"{source}: unknown key {dotted}{hint}\")",
          "            continue", "config"),
    Fault("missing weights are random numbers", "common/models.py", "        if problem := load_problem(report):", "        if problem := None:", "models"),
    Fault("a long checkpoint file may be cut", "common/checkpoints.py",
          "        if path.stat().st_size != expected[\"bytes\"]:\n", "        if False:\n", "checkpoints"),
    Fault("gradients averaged instead of summed", "pytorch-ddp/train.py", "scale = dist.get_world_size() / counts[0].float()",
          "scale = 1 / counts[0].float()", "", "ddp -k plain_loop and 2-2"),
    Fault("mean of the ranks' means", "pytorch-ddp/train.py", "    dist.all_reduce(counts)\n", "", "", "ddp -k plain_loop and 2-2"),
    Fault("no_sync over the last micro-batch", "pytorch-ddp/train.py", "contextlib.nullcontext() if is_last else model.no_sync()",
          "model.no_sync()", "", "ddp -k plain_loop and 2-2"),
    Fault("optimizer's state not loaded", "pytorch-ddp/train.py", "    optimizer.load_state_dict(state[\"optimizer\"])\n", "", "",
          "ddp -k killed-at-32"),
    Fault("FSDP gradients averaged", "pytorch-fsdp/train.py", "scale = dist.get_world_size() / counts[0].float()",
          "scale = 1 / counts[0].float()", "", "fsdp -k those_of_ddp and tied-2"),
    Fault("pipeline counts one micro-batch", "deepspeed-pipeline/train.py", "factor = len(batch.micro_batches) *", "factor = 1 *", "",
          "pipeline -k those_of_ddp and tied-2-2-2"),
    Fault("offload forgets clipping", "common/ds_settings.py", "cfg.train.max_grad_norm,  # 0: none", "0.0,", "",
          "offload -k those_of_ddp and 2-2"),
    Fault("packed documents see those before them", "common/document_attention.py", "(document[:, :, None] == document[:, None, :]).tril_()",
          "(document[:, :, None] >= document[:, None, :]).tril_()", "packing"),
    Fault("positions run on through a block", "common/packing.py", "    return Blocks(tokens[source], labels, positions.astype(np.int32),",
          "    return Blocks(tokens[source], labels, np.arange(len(tokens), dtype=np.int32),", "packing"),
    Fault("a document's first token is learned from the one before", "common/packing.py", "np.where(positions == 0, IGNORE, labels[source])",
          "np.where(positions < 0, IGNORE, labels[source])", "packing"),
    Fault("a stage keeps the mask of the micro-batch before", "deepspeed-pipeline/stages.py", "hidden.dtype, id(documents)",
          "hidden.dtype, documents is None", "", "packing -k a_plain_loop and pipeline and qwen2"),
    Fault("Foundry attends across documents", "llm-foundry-finetune/run_callback.py", "document_inputs(state.model.model, batch.pop(\"position_ids\", None))",
          "document_inputs(state.model.model, None)", "", "foundry -k packed_documents and qwen2"),
]  # fmt: skip


def pytest(copy: Path, selection: list[str]) -> bool:
    """Whether the tests of `selection` fail."""
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *selection]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # no test was selected, say
        sys.exit(
            f"error: pytest {' '.join(selection)}: exit code {done.returncode}\n"
            f"{done.stdout[-2000:]}{done.stderr[-1000:]}"
        )
    return done.returncode == 1


def out_of_date(fault: Fault, repository: Path) -> str:
    """What is wrong with an entry of the table; nothing: its text is in its file, once, and its tests are there."""
    times = (repository / fault.file).read_text(encoding="utf-8").count(fault.old)
    if times != 1:
        return f"{fault.name}: {fault.file} holds {fault.old!r} {times} times: write down where the code is now"
    for name in [*fault.tests.split(), *fault.slow.split(" -k ")[:1]]:
        if name and not (repository / f"tests/test_{name}.py").is_file():
            return f"{fault.name}: there is no tests/test_{name}.py"
    return ""


def caught_by(fault: Fault, copy: Path, fast: bool) -> str:
    """`fast`, `slow`, or nothing, with `fault` planted in `copy`."""
    path = copy / fault.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        files = [f"tests/test_{name}.py" for name in fault.tests.split()]
        if files and pytest(copy, ["-m", "not slow", *files]):
            return "fast"
        if fault.slow and not fast:
            name, _, words = fault.slow.partition(" -k ")
            if pytest(copy, [f"tests/test_{name}.py", "-k", words]):
                return "slow"
        return ""
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--fast", action="store_true", help="the quick tests only")
    arguments = parser.parse_args()
    chosen = [f for f in FAULTS if not arguments.words or any(word in f.name for word in arguments.words)]
    for problem in filter(None, (out_of_date(fault, REPOSITORY) for fault in chosen)):
        sys.exit(f"error: {problem}")
    caught = {}
    with tempfile.TemporaryDirectory(prefix="faults-", dir="/tmp") as folder:
        copy = Path(folder) / "copy"
        files = subprocess.run(["git", "-C", REPOSITORY, "ls-files", "-z"], capture_output=True, check=True).stdout
        for name in filter(None, files.decode().split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((REPOSITORY / name).read_bytes())
            (copy / name).chmod((REPOSITORY / name).stat().st_mode)
        for name in (".venv", ".venv-foundry"):
            (copy / name).symlink_to(REPOSITORY / name)
        for fault in chosen:
            start = time.monotonic()
            caught[fault.name] = caught_by(fault, copy, arguments.fast)
            print(
                f"{fault.name:55} {caught[fault.name] or 'NOT CAUGHT':12} {time.monotonic() - start:4.0f} s", flush=True
            )
    counts = {kind: sum(by == kind for by in caught.values()) for kind in ("fast", "slow", "")}
    print(
        f"\n{len(caught)} faults: {counts['fast']} caught by the quick tests, {counts['slow']} by slow ones, "
        f"{counts['']} not caught"
    )
    sys.exit(bool(counts[""]) and not arguments.fast)


if __name__ == "__main__":
    main()
