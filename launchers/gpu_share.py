"""Start a script with a share of a GPU: `python launchers/gpu_share.py SCRIPT [arguments]`, as a launcher's process.

    GPU_SHARES=2 pytorch-fsdp/launch.sh         # two processes on one GPU

To see several processes work, and to measure them, on a machine with one GPU. `launch.sh` puts this program before the
script if GPU_SHARES is set: local rank i then computes on GPU i // GPU_SHARES and takes that for its machine's only
one. NCCL refuses two ranks on one GPU, unless they are on different hosts; so each process gets a host name of its own,
and what they exchange goes over sockets, through the host's memory.

If CUDA's multi-process service runs (`nvidia-cuda-mps-control -d`), the processes compute at the same time, each on
its share of the multiprocessors; else they take turns. Memory bandwidth, caches and power are common to all.

Nothing here imports torch: CUDA reads the environment when it starts.
"""

from __future__ import annotations

import os
import platform
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path


def share_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What the environment of a launcher's process must hold, for it to have 1 / GPU_SHARES of a GPU to itself."""
    shares, local_rank = int(environment["GPU_SHARES"]), int(environment.get("LOCAL_RANK", 0))
    gpu = local_rank // shares
    visible = list(dict.fromkeys(filter(None, environment.get("CUDA_VISIBLE_DEVICES", "").split(","))))
    local_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", "1"))
    alone = environment.get("WORLD_SIZE", "1") == local_size  # no other machine takes part
    defaults = {
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // shares),
        "NCCL_SOCKET_NTHREADS": "4",
        "NCCL_NSOCKS_PERTHREAD": "4",
        **({"NCCL_SOCKET_IFNAME": "lo"} if alone else {}),
    }
    return {name: value for name, value in defaults.items() if name not in environment} | {
        "GPU_SHARE": f"1/{shares} of GPU {gpu}",  # names what is missing, if there is no such GPU
        "CUDA_VISIBLE_DEVICES": (visible[gpu] if gpu < len(visible) else "") if visible else str(gpu),
        "NCCL_HOSTID": f"{platform.node()}-{local_rank}",
        "LOCAL_RANK": "0",
        "NODE_RANK": environment.get("RANK", "0"),  # Composer's
    }


if __name__ == "__main__":
    os.environ.update(share_variables(os.environ))
    sys.argv = sys.argv[1:]
    # As Python does for a script, instead of this one's folder.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(sys.argv[0]).parent)]
    runpy.run_path(sys.argv[0], run_name="__main__")
