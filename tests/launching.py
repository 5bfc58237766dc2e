"""Start a project as its user does, and read what it left behind.

`run` and `start` go through the project's launch.sh and the framework's own launcher. The Python that these find is
the stand-in of warm_python.py, which has imported the libraries already; with `cold=True` it is the real interpreter,
as a user has it. Tests that stop or kill a run are cold, and compare it with a warm one: so both give the same losses.
"""

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY

from bench import shares
from common.launched import free_port

# Enough to be seen, quick enough to be run often. Prompt-masked rows: their target counts differ between ranks.
SMOKE = ["tracking.backend=none", "eval.every=0", "checkpoint.every=0", "data.train_rows=400", "data.eval_rows=16"]
STEPS = 30
# At smoke.yaml's learning rate of 5e-3, rounding errors of the first steps grow to 1e-4 in thirty.
EQUAL = [
    *SMOKE,
    f"train.max_steps={STEPS}",
    "train.learning_rate=1e-3",
    "train.lr_schedule=constant",
    "train.warmup_steps=0",
]


@contextlib.contextmanager
def project_modules(project: str, *names: str):
    """The project's own modules by name. Two projects have files of one name, so none stays in `sys.modules`."""
    folder = REPOSITORY / project

    def forget() -> None:
        for path in folder.glob("*.py"):
            sys.modules.pop(path.stem, None)

    forget()
    sys.path.insert(0, str(folder))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(folder))
        forget()


def load_train(project: str):
    """The project's train.py as a module: project folders are not packages."""
    with project_modules(project, "train") as found:
        return found["train"]


def assert_close(ours, theirs, relative):
    """`ours` and `theirs` hold a tuple for each step."""
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        assert a == pytest.approx(b, rel=relative), f"step {step}"


SESSION = Path(os.environ["TEST_SESSION"])  # what the processes of one test session share; made by conftest.py
PYTHON = str(SESSION / "warm/main/bin/python")
FOUNDRY = "llm-foundry-finetune"
UNDER_RAY = ("ray-train", "ray-tune")
# Ray's own processes are the real interpreter's, its workers the stand-in's: see warm_python.py.
WARM_RAY = {
    "WARM_EXECUTABLE": sys.executable,
    "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"py_executable": PYTHON}}),
}


def environment(*, cold: bool = False, **variables: str) -> dict[str, str]:
    """This process's environment, with the repository's code first, one thread a process and no Hub token of ours."""
    # What libraries have set in this process would make a zygote for each worker of the tests.
    unwanted = ("HF_", "WANDB_", "MLFLOW_", "_MLFLOW_", "RAY_CLIENT_MODE", "PS1")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    python = sys.executable if cold else PYTHON
    own = {
        "PATH": f"{Path(python).parent}:{kept['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "VIRTUAL_ENV": sys.prefix,
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # as for a cluster of one machine
        "RAY_worker_niceness": "0",  # Ray's default of 15 leaves its workers nothing next to other tests
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # as launch.sh sets it: one zygote serves runs with and without a launcher
    }
    return kept | own | variables


def command(
    project: str, *settings: str, processes: int = 2, config: str = "smoke.yaml", cold: bool = False
) -> list[str]:
    """With one process plain `python train.py`; with more, and if this environment will not do, launch.sh."""
    script = f"{project}/train.py"
    if project == FOUNDRY and not cold:  # what its launch.sh starts, which would find the environment's own Python
        launcher = [str(SESSION / "warm/foundry/bin/python"), f"{FOUNDRY}/composer_launcher.py", "-n", str(processes)]
        start = [*launcher, str(REPOSITORY / script)]
    elif processes == 1 and project != FOUNDRY:
        start = [sys.executable if cold else PYTHON, script]
    else:
        start = [f"{project}/launch.sh"]
    meant = ["runtime.allow_cpu=true"] if config == "config.yaml" else []  # where the test's Hub serves a small model
    return [*start, "--config", config, *meant, *settings]


def start(
    project: str, *settings: str, processes: int = 2, config: str = "smoke.yaml", cold: bool = False, **variables: str
):
    """The running process; its output is merged."""
    if project in UNDER_RAY and not cold:
        variables = WARM_RAY | variables
    if project == FOUNDRY and not cold:  # as launch.sh sets them
        own = SESSION / "warm/foundry/bin"
        variables = {"PYTHONWARNINGS": "ignore", "VIRTUAL_ENV": str(REPOSITORY / ".venv-foundry"),
                     "PATH": f"{own}:{REPOSITORY / '.venv-foundry/bin'}:{os.environ['PATH']}"} | variables  # fmt: skip
    name = uuid.uuid4().hex
    process = subprocess.Popen(
        command(project, *settings, processes=processes, config=config, cold=cold),
        cwd=REPOSITORY,
        env=environment(cold=cold, NPROC_PER_NODE=str(processes), TEST_RUN=name, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    process.test_run = name
    return process


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The launcher that `start` started, and everything below it."""
    found = []
    for member in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if member.environ().get("TEST_RUN") == process.test_run and member.status() != psutil.STATUS_ZOMBIE:
                found.append(member)
    return found


def ranks_of(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """The processes that train, by their rank."""
    named = [(member.environ(), " ".join(member.cmdline()), member) for member in family(process)]
    return {int(variables["RANK"]): member for variables, words, member in named
            if "RANK" in variables and "train.py" in words}  # fmt: skip


def run(project: str, *settings: str, exit_code: int = 0, **options) -> str:
    """Run to the end, check the exit code, return the output."""
    process = start(project, *settings, **options)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == exit_code, output
    return output


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of this test session, which the first test that asks for it makes."""
    folder = SESSION / "made" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".made").exists():
            make(folder)
            (folder / ".made").touch()
    return folder


def finished_run(project: str, *settings: str, **options) -> Path:
    """The folder of a run with these settings, which is made once per session, by the first test that asks for it.

    Only to be read: copy it, or give another output_dir, if a test resumes it.
    """

    def make(folder: Path) -> None:
        (folder / "output.txt").write_text(run(project, *settings, f"output_dir={folder / 'run'}", **options))

    key = hashlib.sha1(json.dumps([settings, options], sort_keys=True).encode()).hexdigest()[:12]
    return made_once(f"{project}-{key}", make) / "run"


def output_of(run_dir: Path) -> str:
    """What a `finished_run` printed."""
    return (run_dir.parent / "output.txt").read_text()


def run_on_two_machines(project: str, *settings: str) -> None:
    """launch.sh with one process on each of two "machines", which share their disk: NNODES, NODE_RANK, MASTER_ADDR."""
    place = {"NPROC_PER_NODE": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    machines = [
        subprocess.Popen(
            [f"{project}/launch.sh", "--config", "smoke.yaml", *settings],
            cwd=REPOSITORY,
            env=environment(**place, NODE_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs


def error_line(output: str) -> str:
    """The one line that names what was wrong; no traceback stands next to it."""
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in output, output
    return lines[0]


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path) -> list[tuple]:
    """What must not differ between two runs: (step, loss, learning rate, gradient norm) and the held-out losses."""
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss")
    return [tuple(record.get(name) for name in names) for record in metrics(run_dir)]


def losses(run_dir: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    return [(record["loss"], record["grad_norm"]) for record in metrics(run_dir) if "loss" in record]


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int, seconds: float = 300) -> None:
    """Return as soon as the run has logged `step`."""
    deadline = time.monotonic() + seconds
    path = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def kill_at_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    """SIGKILL the launcher and everything below it as soon as the run has logged `step`."""
    wait_for_step(process, run_dir, 1)  # by then all of its processes are there; to list them takes some steps' time
    members = family(process)
    wait_for_step(process, run_dir, step)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    psutil.wait_procs(members, timeout=30)
    process.communicate()


@contextlib.contextmanager
def ray_nodes(home: Path, *resources: list[str]) -> Iterator[dict[str, str]]:
    """A cluster of Ray with a node for each of `resources`, started from `home`; the variables to join it.

    What `--num-gpus` counts are GPUs to Ray alone: it hands them out, and PyTorch sees none.
    """
    variables = environment(cold=True)
    variables.pop("PYTHONPATH")  # workers get `common` from Ray
    with shares.ray_nodes(home, [(options, variables) for options in resources]) as cluster:
        yield cluster


@contextlib.contextmanager
def another_job_with_a_gpu(cluster: dict[str, str]) -> Iterator[None]:
    """Another user's job, which holds one GPU of the cluster as long as the block runs."""
    script = """
import ray, sys
ray.init(log_to_driver=False, logging_level="ERROR")
holder = ray.remote(num_gpus=1, num_cpus=0)(type("Holder", (), {"there": lambda self: True})).remote()
print(ray.get(holder.there.remote()), flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(cold=True, **cluster),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "True\n"
        yield
    finally:
        process.communicate("", timeout=60)
