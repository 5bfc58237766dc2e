"""The `deepspeed` launcher, which waits for a checkpoint when it is stopped, and ends with a shell's exit codes.

`python -m launchers.deepspeed_launcher PROCESSES SCRIPT [arguments]` starts what the `deepspeed` command starts on each
machine, `deepspeed.launcher.launch`, and spares the memory of the command itself. By themselves they leave the training
running when they are ended by SIGTERM, or give it 30 seconds, too few for a checkpoint. So a signal goes to the
processes that train; they save and leave, and DeepSpeed's launcher ends after them.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import time

import psutil

from common import errors, launched
from common.errors import UserError

PATIENCE_SECONDS = 300


def launcher_options(processes: int) -> list[str]:
    """Arguments for N processes here, or on each of NNODES machines, which start their own: no ssh is needed."""
    nodes = os.environ.get("NNODES")
    nodes = None if nodes == "1" else nodes  # one machine needs no address
    if nodes and not (nodes.isdecimal() and int(nodes)):
        raise UserError(f"NNODES={nodes}: set it to the number of machines, such as 2")
    if nodes and (missing := [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]):
        raise UserError(
            f"NNODES={nodes}, but {missing[0]} is not set: NODE_RANK is 0 on the first machine, 1 on the next ...; "
            f"MASTER_ADDR is the first machine's address"
        )
    if nodes and (rank := os.environ["NODE_RANK"]) not in map(str, range(int(nodes))):
        raise UserError(f"NODE_RANK={rank}: of NNODES={nodes} machines, the first has 0, the last {int(nodes) - 1}")
    machines = {f"machine-{i}": devices(processes) for i in range(int(nodes or 1))}
    return [
        f"--world_info={base64.urlsafe_b64encode(json.dumps(machines).encode()).decode()}",
        f"--node_rank={os.environ['NODE_RANK'] if nodes else 0}",
        f"--master_addr={os.environ['MASTER_ADDR'] if nodes else '127.0.0.1'}",
        f"--master_port={os.environ.get('MASTER_PORT', 29500) if nodes else launched.free_port()}",
    ]


def devices(processes: int) -> list[str]:
    """What the processes here will see as CUDA_VISIBLE_DEVICES; DeepSpeed starts one for each entry."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return ["-1"] * processes  # no GPU, if there is one that is not meant
    visible = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    if not visible:
        return [str(gpu) for gpu in range(processes)]
    places = [gpu for gpu in visible for _ in range(int(os.environ.get("GPU_SHARES") or 1))]  # GPU_SHARES on each
    if len(places) < processes:
        raise UserError(
            f"{processes} processes, but CUDA_VISIBLE_DEVICES={','.join(visible)} has room for {len(places)}: "
            f"set NPROC_PER_NODE lower, or more GPUs visible"
        )
    return places[:processes]


def training_processes(launcher: psutil.Process) -> list[psutil.Process]:
    """The processes that have a rank; what they started themselves is theirs to stop."""
    found = []
    for process in launcher.children(recursive=True):
        try:
            if "RANK" in process.environ() and "RANK" not in process.parent().environ():
                found.append(process)
        except (psutil.Error, AttributeError):  # it has ended meanwhile
            continue
    return found


def run(command: list[str]) -> int:
    """Run the launcher to its end and return the exit code, as a shell would report it."""
    # A group of its own: Ctrl-C in a terminal would else reach every process at once.
    launcher = psutil.Popen(command, process_group=0)
    stopped_by, deadline = 0, float("inf")

    def stop(number: int, frame: object) -> None:
        nonlocal stopped_by, deadline
        deadline = 0 if stopped_by == signal.SIGINT == number else time.monotonic() + PATIENCE_SECONDS
        stopped_by = number
        for process in training_processes(launcher) or [launcher]:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):  # as nohup sets it
            signal.signal(number, stop)
    while launcher.poll() is None:
        try:
            launcher.wait(timeout=1)
        except psutil.TimeoutExpired:
            if time.monotonic() > deadline:
                for process in [*launcher.children(recursive=True), launcher]:
                    process.kill()
    code = launcher.returncode
    if stopped_by:
        return 128 + stopped_by
    if code > 192:  # DeepSpeed's launcher reports a rank's death by signal 9 as -9, which is 247
        return 128 + 256 - code
    return code if code >= 0 else 128 - code


def main() -> int:
    """Start the processes of `sys.argv` (their number, script, arguments) and wait; returns the exit code."""
    processes, *script = sys.argv[1:]
    # AdamW runs on the CPU: every process gets its share of the cores, or each would take all of them.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(processes))))
    # Ranks report why they fail, in one line. --no_local_rank: it is in the environment.
    options = [*launcher_options(int(processes)), "--no_local_rank", "--log_level=critical"]
    launched.forget()
    # -P: the current folder may have one called deepspeed.
    return run([sys.executable, "-P", "-m", "deepspeed.launcher.launch", *options, *script])


if __name__ == "__main__":
    errors.run(main)
