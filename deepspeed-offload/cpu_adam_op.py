"""DeepSpeed's cpu_adam: compiled before the training, or a clear error if that cannot be."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import sys
from pathlib import Path

import cpuinfo
import psutil
import torch
import torch.distributed as dist
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch.utils.cpp_extension import TORCH_LIB_PATH, get_default_build_root

from common.errors import UserError

INSTEAD = "or set offload.optimizer=torch, PyTorch's own AdamW on the CPU, which needs neither"


def build_cpu_adam() -> None:
    """Compile DeepSpeed's AdamW for this machine's CPU, or load what was compiled before.

    On each machine the first rank compiles while the other ranks wait: two compilers in one folder break it.
    Raises `UserError` if the compiler or ninja is missing or fails.
    """
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    ask_for_the_cpu_once()
    if not installed_ops.get(CPUAdamBuilder.NAME):  # else it came compiled with the package
        find_tools()
        if first:
            remove_stale_locks()
    if first:
        _load(compiled_before())
    dist.barrier()
    if not first:
        _load(True)


def ask_for_the_cpu_once() -> None:
    """DeepSpeed asks three times what CPU this is, and each answer takes a process that sleeps for a second."""
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


def find_tools() -> None:
    """Put the ninja of the Python package on the PATH, if there is no other.

    Raises `UserError` if ninja or a C++ compiler is missing, and for a path that torch hands to the linker unquoted.
    """
    if shlex.quote(TORCH_LIB_PATH) != TORCH_LIB_PATH:
        odd = "a space" if " " in TORCH_LIB_PATH else "a character that a shell takes for its own"
        raise UserError(
            f"DeepSpeed's cpu_adam cannot be linked: the path of PyTorch's libraries has {odd} in it: "
            f"{TORCH_LIB_PATH}: make the environment elsewhere, {INSTEAD}"
        )
    if not shutil.which("ninja"):
        try:
            import ninja
        except ImportError:
            raise UserError(
                f"DeepSpeed's cpu_adam is compiled with ninja, which is not installed: pip install ninja, {INSTEAD}"
            ) from None
        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]])
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise UserError(
            f"DeepSpeed's cpu_adam is compiled with a C++ compiler, and {compiler} is not installed: install g++ (on "
            f"Debian and Ubuntu: apt-get install g++), or set CXX to another one, {INSTEAD}"
        )


def compiled_before() -> bool:
    return any(_build_root().rglob(f"{CPUAdamBuilder.NAME}.so"))


def remove_stale_locks() -> None:
    """Remove the lock of a compilation that was killed: torch would wait for it forever, without a word.

    Its owner keeps it open. Over several machines, which may share the folder, the owner may be on another one.
    """
    locks = {str(path.resolve()) for path in _build_root().rglob(f"{CPUAdamBuilder.NAME}/lock")}
    if not locks or os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE"):
        return
    for process in psutil.process_iter():
        try:
            locks -= {file.path for file in process.open_files()}
        except psutil.Error:  # it has ended, or is another user's
            continue
    for lock in locks:
        Path(lock).unlink(missing_ok=True)


def _build_root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _load(quiet: bool) -> None:
    if not quiet:
        print("Compiling DeepSpeed's cpu_adam for this machine, once: a minute or two ...", file=sys.stderr, flush=True)
    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # of torch's builder, the compiler, the linker or the loader
        reason = next((line for line in str(error).splitlines() if "error:" in line), str(error).splitlines()[0])
        raise UserError(f"DeepSpeed's cpu_adam does not compile: {reason.strip()}; fix that, {INSTEAD}") from error


def replay_steps(optimizer, steps: int) -> None:
    """Bring the op to where it was after `steps` steps.

    It keeps the powers of Adam's betas as running products, in no state that could be saved. Recomputed they differ
    in the last bit, and so would every later step.
    """
    tensors = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *optimizer.defaults["betas"], 1.0, 0.0, True, *tensors
        )
