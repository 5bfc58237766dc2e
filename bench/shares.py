"""What launchers/gpu_share.py needs in addition, for measuring: CUDA's multi-process service, and nodes of Ray.

Ray starts its workers by itself, one for each GPU; so each of its nodes has a share of the GPU, and takes it for a
GPU. What a process allocates on a share is what it would on a GPU of its own; what it computes in a second is its
share's. An eighth of an H200 multiplies matrices at 99 TFLOP/s (measured); a T4's data sheet gives 65.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from common.launched import free_port
from launchers.gpu_share import share_variables

RAY = {"RAY_AUTH_MODE": "disabled"}  # no token of ours in the home folder
RAY_START_SECONDS = 120


@contextlib.contextmanager
def multi_process_service() -> Iterator[None]:
    """Processes that start in this block share the GPU through MPS. Changes no setting of the GPU."""
    if not shutil.which("nvidia-cuda-mps-control"):
        sys.exit("error: --shares: no nvidia-cuda-mps-control here, which comes with NVIDIA's driver")
    with tempfile.TemporaryDirectory(prefix="mps-", dir="/tmp") as folder:
        os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True)
        try:
            yield
        finally:
            subprocess.run(["nvidia-cuda-mps-control"], input="quit -t 5\n", text=True, check=False)


def service_log() -> str:
    """What MPS wrote last, if it runs: the reason, if it refused a process."""
    log = Path(os.environ.get("CUDA_MPS_LOG_DIRECTORY", "")) / "server.log"
    return log.read_text(errors="replace")[-2000:] if log.exists() else ""


def share_of_node(environment: dict[str, str], node: int) -> dict[str, str]:
    """The share of the GPU that the workers of one of Ray's nodes have: see launchers/gpu_share.py."""
    variables = share_variables(environment | {"LOCAL_RANK": str(node), "WORLD_SIZE": "1"})
    return {name: value for name, value in variables.items() if name.startswith(("CUDA_", "GPU_", "NCCL_"))}


@contextlib.contextmanager
def ray_nodes(home: Path, nodes: list[tuple[list[str], dict[str, str]]]) -> Iterator[dict[str, str]]:
    """A cluster of Ray, started from `home` with `ray start`: for each of `nodes` one with its options and environment.

    Gives the variables with which to join it. Raises `RuntimeError` if a node does not start.
    """
    port = free_port()
    temporary = f"/tmp/ray-nodes-{os.getpid()}-{port}"  # a socket's path must be short
    head = ["--head", f"--port={port}", f"--temp-dir={temporary}", f"--dashboard-port={free_port()}"]
    started: list[psutil.Popen] = []
    try:
        for options, variables in nodes:
            log = home / f"node-{len(started)}.log"
            place = [f"--address=127.0.0.1:{port}"] if started else head
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *place, *options]
            command += ["--dashboard-agent-listen-port=0", "--disable-usage-stats"]
            with log.open("wb") as file:
                started.append(psutil.Popen(command, cwd=home, env=variables | RAY, stdout=file, stderr=file))
            deadline = time.monotonic() + RAY_START_SECONDS
            while "Ray runtime started" not in log.read_text():
                if not started[-1].is_running() or time.monotonic() > deadline:
                    raise RuntimeError(log.read_text())
                time.sleep(0.2)
        yield RAY | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        assert all(node.is_running() and node.status() != psutil.STATUS_ZOMBIE for node in started)  # left as it was
    finally:
        family = [member for node in started for member in [*node.children(recursive=True), node]]
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.kill()
        psutil.wait_procs(family, timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)
