"""What a launcher sets in the environment of a process: all of it, or nothing.

A launcher (torchrun, deepspeed, composer) sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every process that it
starts. Shells, schedulers and other programs leave some of these behind, or empty, and libraries read them as well.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket

from common.errors import UserError

ALL = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
# What else launchers set: torchrun, DeepSpeed (LOCAL_SIZE, CROSS_…), Composer (NODE_RANK, BASE_RANK).
OTHERS = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
          "ROLE_RANK", "ROLE_WORLD_SIZE", "NODE_RANK", "BASE_RANK", "TORCHELASTIC_RUN_ID",
          "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")  # fmt: skip
# Who starts several processes without setting RANK: (command, the process's rank, their number).
STARTERS = (
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE"),
    ("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
# What Accelerate would read: it takes MPI's variables for a launch, and `accelerate config`'s for its arguments.
ACCELERATE = ("ACCELERATE_", "OMPI_COMM_WORLD_", "PMI_RANK", "PMI_SIZE", "MV2_COMM_WORLD_", "MPI_LOCAL")


def settle() -> None:
    """Make the environment agree with how this process was started.

    Without a launcher none of its variables stay: the process is a group of one. Raises `UserError` for a process that
    is one of several, but cannot find the other ones.
    """
    for name in (*ALL, *OTHERS):
        if not os.environ.get(name, "x"):
            del os.environ[name]
    launched = _by_a_launcher()
    if not launched:
        _check_alone()
        _drop(*ALL, *OTHERS)
    elif "LOCAL_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:  # DeepSpeed's name for it
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"]
    _drop(*(name for name in os.environ if name.startswith(ACCELERATE)))
    alone = not launched or os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if alone and loopback:  # all processes are on this machine: Gloo need not resolve its name, which may take long
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)


def forget() -> None:
    """For a launcher: drop what others left of their launches. With NNODES, the user's MASTER_ADDR and NODE_RANK stay.

    Raises `UserError` if this is one of several launchers, none of which knows the other ones.
    """
    ours: tuple[str, ...] = ()
    if os.environ.get("NNODES"):
        ours = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    else:
        _check_alone()
    _drop(*({*ALL, *OTHERS} - {*ours}))


def free_port() -> int:
    """A TCP port on which nothing listens.

    Below the range that outgoing connections take theirs from: rank 0 listens on it only after seconds of imports, and
    another run's connections would have that long to take it.
    """
    for port in random.sample(range(20000, 32768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError("this machine has no free port from 20000 to 32767, which the ranks need to find each other")


def _by_a_launcher() -> bool:
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None:
        return False
    for name in NUMBERS:
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name}={os.environ[name]}: a launcher sets it to a number; unset it")
    if missing := [name for name in ALL if name not in os.environ]:
        if int(rank) == 0 and int(world_size or 1) == 1:
            return False
        these = " and ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ)
        raise UserError(
            f"{these}: one process of several, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            f"set: start with launch.sh or torchrun, or unset RANK and WORLD_SIZE"
        )
    if int(rank) >= (processes := int(os.environ["WORLD_SIZE"])):
        raise UserError(f"RANK={rank}: of WORLD_SIZE={processes} processes the last is {processes - 1}")
    return True


def _check_alone() -> None:
    for command, rank, size in STARTERS:
        number = os.environ.get(size, "")
        if os.environ.get(rank) and number.isdecimal() and int(number) > 1:
            raise UserError(
                f"{command} started {number} of these ({size}={number}), and each would train by itself: start "
                f"launch.sh once on each machine, with NNODES, NODE_RANK and MASTER_ADDR if there are several"
            )


def _drop(*names: str) -> None:
    for name in names:
        os.environ.pop(name, None)
