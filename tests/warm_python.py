"""A Python that has imported the heavy libraries already: a stand-in for the interpreter that starts in milliseconds.

Nearly all of a small run's time is imports: torch, transformers and DeepSpeed take 4 to 8 seconds of one core in every
process. `make_bin` writes a `python` that runs a command as the real interpreter would, but in a process forked from a
*zygote*, which has imported the libraries and nothing of this repository. The launchers stay the real ones: launch.sh,
torchrun, DeepSpeed's and Composer's launchers start this `python` because it comes first on the PATH, and set
the environment of each rank themselves.

    test ── launch.sh ── python (client) ── torchrun ── python (client)      what a launcher sees, signals and reaps
                              │                              │
                           zygote ────────── fork ───────────┴─ the process that runs the code

- A process is forked only from a zygote that was started with the same value of *every* environment variable, except
  those in PER_PROCESS: what a library reads while it is imported cannot come from another run.
- The client hands over its working folder, open files, limits and ignored signals, and forwards every signal that it
  receives. If the client is killed, so is the forked process. The client ends as the forked process ended.
- A zygote has a single thread and has initialised neither CUDA nor a process group; otherwise it refuses to fork.
- A zygote ends with the test session that made its folder, or after IDLE_SECONDS without work.

What differs from a fresh interpreter: modules are imported already, `/proc/PID/environ` is the zygote's, and the
process is not a descendant of its launcher. Tests that look at any of these start the real interpreter.

Ray reads its settings while it is imported, and no zygote imports it. Its agents watch their parent by its number, so
they are the real interpreter's (WARM_EXECUTABLE is what Ray takes for Python). Only its workers are forked, by
`py_executable` of the runtime environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

IDLE_SECONDS = 180
# What launchers and shells set differently in each process. No library reads them while it is imported.
PER_PROCESS = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "CROSS_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE",
    "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_SIGNALS_TO_HANDLE", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "NNODES", "NPROC_PER_NODE", "GPU_SHARES", "PWD", "OLDPWD", "SHLVL", "_", "COLUMNS", "LINES", "PYTHONPATH",
    "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "TEST_RUN", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME",
    "PYTHONSAFEPATH", "SPT_NOENV", "PL_DISABLE_FORK",
}  # fmt: skip
NEVER_IMPORTED = ("RAY_", "TUNE_", "WANDB_")  # nor these: no zygote imports Ray or W&B
LIMITS = ("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_STACK")
NAMESPACES = ("mnt", "net", "pid", "user", "uts")
NO_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # pyarrow's allocator would start one
# Flags that this file knows. A command with any other starts the real interpreter.
FLAGS = {"-u", "-B", "-P"}
# What a zygote imports. Names that an environment lacks are passed over.
BASE = ("torch", "torch.distributed.run", "torch.distributed.elastic.multiprocessing.api", "transformers.models.auto",
        "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.opt.modeling_opt", "transformers.models.bloom.modeling_bloom", "torch._dynamo",
        "torch.distributed.checkpoint.state_dict", "datasets", "accelerate", "matplotlib.figure", "omegaconf",
        "psutil", "torch.distributed.fsdp")  # fmt: skip
RAY_WORKER = "ray/_private/workers/default_worker.py"
# Its engine imports torch's compiler when it starts, by way of Muon.
DEEPSPEED = ("deepspeed", "deepspeed.launcher.launch", "deepspeed.runtime.zero.muon.muon_optimizer")
FOUNDRY = ("composer", "llmfoundry", "llmfoundry.command_utils")


def make_bin(folder: Path, python: Path) -> Path:
    """A folder with `python` and `python3` that stand in for the interpreter `python`; zygotes live below `folder`."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    script = binaries / "python"
    words = [f"WARM_FOLDER='{folder}'", f"WARM_PYTHON='{python}'", f"WARM_OWNER={os.getpid()}"]
    script.write_text(f'#!/bin/sh\nexport {" ".join(words)}\nexec "$WARM_PYTHON" -IS \'{__file__}\' "$@"\n')
    script.chmod(0o755)
    (binaries / "python3").symlink_to("python")
    return binaries


def import_list(arguments: list[str], environment: dict[str, str]) -> tuple[str, ...]:
    """What the command will import, by the project that it belongs to."""
    words = " ".join(arguments)
    if "--check" in arguments:  # launch.sh looks at the settings: nothing is imported, and any zygote will do
        return BASE
    if ".venv-foundry" in os.environ["WARM_PYTHON"]:
        return BASE + FOUNDRY
    if any(part in words for part in ("deepspeed", "ray-t", RAY_WORKER)) or "DS_ACCELERATOR" in environment:
        return BASE + DEEPSPEED
    return BASE


def client(arguments: list[str]) -> None:
    """Run `python ARGUMENTS` in a process forked from a zygote, and end as it ends."""
    flags = 0
    while flags < len(arguments) and arguments[flags] in FLAGS:
        flags += 1
    command = arguments[flags:]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WARM_")}
    is_module = len(command) > 1 and command[0] in ("-m", "-c")
    is_script = bool(command) and command[0].endswith(".py")
    if is_script and "site-packages" in command[0] and RAY_WORKER not in command[0]:
        is_script = False  # a library's own, such as py-cpuinfo's: it imports little
    if not (is_module or is_script):
        os.execve(os.environ["WARM_PYTHON"], [os.environ["WARM_PYTHON"], *arguments], environment)
    connection = connect(import_list(command, environment), environment)
    files = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    files = [fd for fd in files if fd != connection.fileno() and os.path.exists(f"/proc/self/fd/{fd}")]
    ignored = [s for s in signal.valid_signals() if s > 0 and signal.getsignal(s) == signal.SIG_IGN]
    request = {
        "command": command, "flags": arguments[:flags], "environment": environment, "cwd": os.getcwd(),
        "files": files, "ignored": [int(s) for s in ignored], "parent": os.getppid(), "umask": os.umask(0),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in LIMITS},
        "executable": os.environ.get("WARM_EXECUTABLE") or f"{os.environ['WARM_FOLDER']}/bin/python",
    }  # fmt: skip
    everything = signal.valid_signals()
    request["blocked"] = [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, everything)]
    body = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("!I", len(body))], files)
    connection.sendall(body)
    for fd in files:
        os.close(fd)
    pid = int(read_line(connection))

    def pass_on(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE}:
        with contextlib.suppress(OSError):
            if number not in ignored:
                signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, everything)
    code = int(read_line(connection) or 1)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def read_line(connection: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            return b""
        text += byte
    return text


def connect(imports: tuple[str, ...], environment: dict[str, str]) -> socket.socket:
    """A connection to the zygote of this environment, which is started if there is none."""
    shared = {k: v for k, v in environment.items() if k not in PER_PROCESS and not k.startswith(NEVER_IMPORTED)}
    place = [os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES] + [os.getuid(), os.stat("/").st_ino]
    key = hashlib.sha1(json.dumps([imports, shared, place], sort_keys=True).encode()).hexdigest()[:16]
    path = f"{os.environ['WARM_FOLDER']}/{key}"
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(path)
                return connection
            except OSError:
                start_zygote(path, imports, shared)


def start_zygote(path: str, imports: tuple[str, ...], environment: dict[str, str]) -> None:
    ready, write_end = os.pipe()
    with open(f"{path}.log", "ab") as log:
        process = subprocess.Popen(
            [os.environ["WARM_PYTHON"], __file__, "--zygote", path, os.environ["WARM_OWNER"], str(write_end), *imports],
            env=environment | NO_THREADS, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, pass_fds=[write_end],
        )  # fmt: skip
    os.close(write_end)
    if not os.read(ready, 1):
        sys.exit(f"no zygote (exit code {process.wait()}): {Path(f'{path}.log').read_text()[-2000:]}")
    os.close(ready)


def zygote(path: str, owner: int, ready: int, imports: list[str]) -> dict:
    """Import, then fork a process for each request. Returns in that process, with the request."""
    import gc
    import importlib
    import select

    gc.disable()  # what is imported stays
    for name in imports:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()
    gc.enable()
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit(f"an import has started threads: {os.listdir('/proc/self/task')}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    os.write(ready, b"1")
    os.close(ready)
    running: dict[int, socket.socket] = {}  # by process
    idle_since = time.monotonic()
    while True:
        readable, _, _ = select.select([server, wake_read, *running.values()], [], [], 1)
        if server in readable:
            connection, _ = server.accept()
            request, files = receive(connection)
            pid = os.fork() if request else 0
            if request and pid == 0:
                for fd in (server, connection, *running.values()):
                    fd.close()
                signal.set_wakeup_fd(-1)
                os.close(wake_read)
                os.close(wake_write)
                take_files(request["files"], files)
                return request
            for fd in files:
                os.close(fd)
            if request:
                connection.sendall(b"%d\n" % pid)
                running[pid] = connection
        with contextlib.suppress(BlockingIOError):
            os.read(wake_read, 4096)
        for pid, connection in [*running.items()]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                with contextlib.suppress(OSError):
                    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                connection.close()
                del running[pid]
            elif connection in readable:  # the client was killed
                os.kill(pid, signal.SIGKILL)
        if running or server in readable:
            idle_since = time.monotonic()
        if time.monotonic() - idle_since > IDLE_SECONDS or not os.path.exists(f"/proc/{owner}"):
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            os.unlink(path)
            os._exit(0)


def receive(connection: socket.socket) -> tuple[dict | None, list[int]]:
    """A request and its open files."""
    head, files, _, _ = socket.recv_fds(connection, 4, 250)
    if len(head) < 4:
        return None, files
    left, body = struct.unpack("!I", head)[0], b""
    while left:
        part = connection.recv(min(left, 1 << 16))
        body += part
        left -= len(part)
    return json.loads(body), files


def take_files(numbers: list[int], files: list[int]) -> None:
    """Give the received files the numbers that they had in the client."""
    free = max([*numbers, *files, 2]) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, free) for fd in files]
    for fd in files:
        os.close(fd)
    for number, fd in zip(numbers, moved, strict=True):
        os.dup2(fd, number, inheritable=True)
        os.close(fd)


def become(request: dict) -> None:
    """Run the command of the request in this process, as a fresh interpreter would."""
    import random
    import types
    import warnings

    random.seed()
    os.setpgid(0, 0)  # Ray ends a worker's whole process group, which must not be the zygote's
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    parent = request["parent"]
    os.getppid = lambda: parent
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if number in request["ignored"]:  # SIGPIPE and SIGXFSZ too, as in any Python
            signal.signal(number, signal.SIG_IGN)
        elif number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        elif number < signal.SIGRTMIN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        old = getattr(sys, name)
        lines = name == "stderr" or os.isatty(fd)
        buffering = 1 if lines else -1
        new = os.fdopen(fd, mode, encoding=old.encoding, errors=old.errors, buffering=buffering, closefd=False)
        if name == "stdout" and ("-u" in request["flags"] or os.environ.get("PYTHONUNBUFFERED")):
            new.reconfigure(write_through=True)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    if "ignore" in os.environ.get("PYTHONWARNINGS", ""):
        warnings.simplefilter("ignore")
    os.umask(request["umask"])
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), limit)
    sys.executable = request["executable"]
    command = request["command"]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    del sys.path[0]  # this file's folder
    extra = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(":") if entry]
    if command[0] == "-c":
        sys.argv, first = ["-c", *command[2:]], ""
    elif command[0] == "-m":
        sys.argv, first = ["-m", *command[2:]], os.getcwd()
    else:
        sys.argv, first = command, os.path.dirname(os.path.realpath(command[0]))
    safe_path = "-P" in request["flags"] or os.environ.get("PYTHONSAFEPATH")
    sys.path[:0] = extra if safe_path else [first, *extra]
    if command[0] == "-m":
        import runpy

        runpy._run_module_as_main(command[1])
        return
    if command[0] == "-c":
        code = compile(command[1], "<string>", "exec")
    else:
        main.__file__ = command[0]
        with open(command[0], "rb") as file:
            code = compile(file.read(), command[0], "exec")
    main.__dict__["__builtins__"] = __builtins__
    exec(code, main.__dict__)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--zygote"]:
        become(zygote(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]))
    else:
        client(sys.argv[1:])
