"""The stand-in for Python (warm_python.py) behaves as the interpreter that it stands in for."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from launching import PYTHON, WARM_RAY, environment

pytestmark = pytest.mark.slow

# Prints what a program can see of its own start.
SELF = """
import json, os, signal, sys
fields = {
    "argv": sys.argv, "name": __name__, "cwd": os.getcwd(), "path": sys.path, "stdin": sys.stdin.read(),
    "environment": {k: v for k, v in os.environ.items() if k not in ("_", "PATH", "PWD", "SHLVL", "LC_CTYPE")},
    "ignored": [s for s in range(1, 32) if signal.getsignal(s) == signal.SIG_IGN],
    "sigint": str(signal.getsignal(signal.SIGINT)), "parent": os.getppid(), "encoding": sys.stdout.encoding,
}
print(json.dumps(fields), file=sys.stderr)
"""


def both_ways(*arguments: str, stdin: str = "", variables: dict | None = None, **options):
    done = []
    for python, cold in ((sys.executable, True), (PYTHON, False)):
        own = environment(cold=cold, GREETING="grüß dich", **(variables or {}))
        done.append(
            subprocess.run([python, *arguments], env=own, input=stdin, capture_output=True, text=True, **options)
        )
    return done


@pytest.mark.parametrize("safe_path", ["", "-P", "PYTHONSAFEPATH"])
@pytest.mark.parametrize("kind", ["script", "module", "code"])
def test_a_program_sees_the_same_start(tmp_path, kind, safe_path):
    (tmp_path / "itself.py").write_text(SELF)
    how = {"script": ["itself.py"], "module": ["-m", "itself"], "code": ["-c", SELF]}[kind]
    variables = {"PYTHONPATH": str(tmp_path)} | ({safe_path: "1"} if safe_path == "PYTHONSAFEPATH" else {})
    flags = ["-u", safe_path] if safe_path == "-P" else ["-u"]
    real, warm = both_ways(*flags, *how, "one", "--two=3", stdin="typed", variables=variables, cwd=tmp_path)
    assert real.returncode == warm.returncode == 0, warm.stderr
    assert json.loads(real.stderr) == json.loads(warm.stderr)


def test_the_end_is_that_of_the_program():
    endings = {
        "sys.exit(3)": 3, "sys.exit('why')": 1, "1 / 0": 1, "os._exit(7)": 7, "pass": 0,
        "os.kill(os.getpid(), 9)": -9, "import signal; os.kill(os.getpid(), signal.SIGTERM)": -15,
    }  # fmt: skip
    for code, expected in endings.items():
        real, warm = both_ways("-c", f"import atexit, os, sys\natexit.register(print, 'at the end')\n{code}")
        assert real.returncode == warm.returncode == expected, code
        assert real.stdout == warm.stdout and ("ZeroDivisionError" in warm.stderr) == ("1 / 0" in code)


def test_signals_reach_the_program_and_it_dies_with_its_client():
    # os.write: the signal may come while the line below is still inside print, which cannot be entered again.
    code = "import os, signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'heard\\n'))\n"
    code += "print(os.getpid(), flush=True)\ntime.sleep(60)\ntime.sleep(60)"
    process = subprocess.Popen([PYTHON, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert pid != process.pid
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "heard\n"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


def test_files_that_a_parent_opened_are_the_programs_too():
    read_end, write_end = os.pipe()
    code = f"import os; os.write({write_end}, b'through the pipe')"
    subprocess.run([PYTHON, "-c", code], env=environment(), pass_fds=[write_end], check=True)
    os.close(write_end)
    assert os.read(read_end, 100) == b"through the pipe"
    os.close(read_end)


def test_libraries_are_there_and_take_their_settings_from_the_environment(tmp_path):
    """`HF_HOME` is read once, while huggingface_hub is imported."""
    code = "import sys; print('torch' in sys.modules); from huggingface_hub import constants; print(constants.HF_HOME)"
    for folder in ("a", "b", "a"):
        variables = environment(HF_HOME=str(tmp_path / folder))
        done = subprocess.run([PYTHON, "-c", code], env=variables, capture_output=True, text=True)
        assert done.stdout.split() == ["True", str(tmp_path / folder)], done.stderr


def test_workers_of_ray_are_forked_and_one_that_ends_takes_no_other_with_it():
    """Ray ends a worker with its process group. What Ray reads while it is imported is this run's."""
    code = """
import os, sys, tempfile, time
started_warm = "torch" in sys.modules
import ray

class Worker:
    def see(self):
        return "torch" in sys.modules, ray._config.worker_register_timeout_seconds(), os.getpgrp()

with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=folder)
    ended, other = (ray.remote(Worker).remote() for _ in range(2))
    seen = ray.get([ended.see.remote(), other.see.remote()])
    ray.kill(ended)
    time.sleep(2)
    again = ray.get(other.see.remote())
    ray.shutdown()
warm, sizes, groups = zip(*seen)
print(started_warm, *warm, *sizes, len(set(groups)), again == seen[1])
"""
    variables = environment(**WARM_RAY, RAY_worker_register_timeout_seconds="99")
    done = subprocess.run([PYTHON, "-c", code], env=variables, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["True True True 99 99 2 True"], done.stdout + done.stderr
