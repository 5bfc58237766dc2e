"""Trackers, with the real libraries: what a process with a training-like loop logs is read back from their storage."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import refused
from wandb_log import config, history, read_wandb

from common.config import BaseConfig
from common.launched import free_port
from common.tracking import Tracker, check_tracker, log_results

REPOSITORY = Path(__file__).resolve().parent.parent
LONG = "x" * 20_000
SECRET = "f00dfeed" * 5

# A training as the tracker sees it. sys.argv: run folder, backend, first step, last step, status, patience.
LOOP = """
import sys, time
from pathlib import Path
from common.config import BaseConfig, save_config
from common import tracking
from common.tracking import start_tracker

run_dir, backend, first, last, status = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
cfg = BaseConfig()
cfg.tracking.backend, cfg.tracking.project = backend, "letters"
cfg.train.max_steps = last
cfg.data.prompt_template = "x" * 20_000
run_dir.mkdir(parents=True, exist_ok=True)
save_config(cfg, run_dir / "config.yaml")
(run_dir / "environment.json").write_text('{"git_commit": "0a1b2c with local changes", "precision": "fp16: as set"}')
(run_dir / "plots").mkdir(exist_ok=True)
(run_dir / "plots" / "loss.png").write_bytes(b"picture")
tracking.PATIENCE = float(sys.argv[6])
began = time.monotonic()
tracker = start_tracker(cfg, run_dir, "pytorch-ddp")
print("url:", tracker.url)
slowest = 0.0
for step in range(first, last + 1):
    before = time.monotonic()
    tracker.log({"loss": 1 / step, "learning_rate": float("nan") if step == 2 else 0.1, "peak_gpu_gib": None}, step)
    slowest = max(slowest, time.monotonic() - before)
    PAUSE
tracker.log_artifacts(run_dir / "plots")
tracker.finish(status)
tracker.finish("failed")
print("url afterwards:", tracker.url)
print("seconds:", time.monotonic() - began)
print("slowest log:", slowest)
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment without any tracker's settings, and with a home folder that holds no keys."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW", "NETRC"))}
    return kept | {"HOME": str(home), "PYTHONPATH": str(REPOSITORY)} | more


def train(
    run_dir: Path,
    backend: str,
    first: int = 1,
    last: int = 20,
    status: str = "completed",
    *,
    pause: str = "pass",
    patience: float = 20.0,
    **env: str,
) -> tuple[dict[str, str], str, float]:
    """Run LOOP in a process; returns what it printed as a mapping, its stderr, and its seconds from start to exit."""
    began = time.monotonic()
    arguments = [run_dir, backend, str(first), str(last), status, str(patience)]
    done = subprocess.run(
        [sys.executable, "-c", LOOP.replace("    PAUSE", f"    {pause}"), *arguments],
        env=environment(run_dir.parent, **env),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    return printed, done.stderr, time.monotonic() - began


def assert_one_warning(stderr: str, backend: str) -> None:
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith(f"warning: tracking.backend={backend} is off"), stderr


def assert_nowhere(secret: str, folder: Path, *printed: str) -> None:
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert files
    assert [p for p in files if secret.encode() in p.read_bytes()] == []
    assert not any(secret in text for text in printed)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "my run" / "first"


# --- none -------------------------------------------------------------------------------


def test_no_tracker_imports_and_writes_nothing(tmp_path: Path):
    code = f"""
import sys, threading
from pathlib import Path
from common.config import BaseConfig
from common.tracking import start_tracker
cfg = BaseConfig()
cfg.tracking.backend = "none"
tracker = start_tracker(cfg, Path({str(tmp_path / "run")!r}), "")
tracker.log({{"loss": 1.0}}, 1)
tracker.log_artifacts(Path("nothing"))
tracker.finish("completed")
assert tracker.url == ""
assert threading.active_count() == 1
assert not {{"mlflow", "wandb"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["mlflow", "wandb"])
def test_a_missing_library_is_named_with_its_pip_command_before_the_run(monkeypatch, backend: str):
    cfg = BaseConfig()
    cfg.tracking.backend = backend
    check_tracker(cfg)
    monkeypatch.setitem(sys.modules, backend, None)
    with refused(f"tracking.backend={backend}", f"pip install {backend}", "tracking.backend=none"):
        check_tracker(cfg)


# What a broken library does, when it is imported, started, given metrics and closed.
BROKEN = {
    "refuses its import": "raise ImportError('libcudart.so.99: cannot open shared object file')",
    "has a dependency of another version": "raise TypeError('Descriptors cannot be created directly')",
    "finds no user": "import pwd; pwd.getpwuid(4294967294)",
    "leaves the process": "raise SystemExit('wandb: ERROR quitting')",
    "starts and fails": "def __getattr__(name): raise RuntimeError('no ' + name)",
}


@pytest.mark.parametrize("backend", ["mlflow", "wandb"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_library_is_a_warning(tmp_path: Path, backend: str, how: str):
    (tmp_path / f"{backend}.py").write_text(BROKEN[how])
    printed, stderr, _ = train(tmp_path / "run", backend, PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert_one_warning(stderr, backend)
    assert "metrics.jsonl" in stderr or how == "starts and fails"
    assert printed["url"] == printed["url afterwards"] == ""


class Fragile:
    """A backend that fails in one of its methods, with an error of any kind."""

    url, remedy = None, "nothing is lost"

    def __init__(self, method: str, error: BaseException):
        self._method, self._error = method, error

    def __getattr__(self, name: str):
        def call(*_):
            if name == self._method:
                raise self._error

        return call


@pytest.mark.parametrize("method", ["start", "log", "log_artifact", "finish"])
@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), KeyError("uid"), SystemExit(1)])
def test_a_tracker_that_fails_at_any_time_is_one_warning(capsys, tmp_path: Path, method: str, error: BaseException):
    tracker = Tracker("wandb", lambda: Fragile(method, error))
    tracker.log({"loss": 1.0}, 1)
    tracker.log_artifacts(tmp_path)
    tracker.finish("completed")
    assert tracker.url == ""
    assert_one_warning(capsys.readouterr().err, "wandb")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "is_logged"),
    [
        ({"WANDB_MODE": "disabled"}, False),
        ({"WANDB_DISABLED": "true"}, False),
        ({"WANDB_MODE": "dryrun"}, True),
        ({"WANDB_MODE": ""}, True),
    ],
    ids=str,
)
def test_wandb_by_its_own_switches(run_dir: Path, variables: dict, is_logged: bool):
    printed, stderr, _ = train(run_dir, "wandb", **variables)
    assert stderr == ""
    assert bool(printed["url"]) == bool(segments(run_dir)) == (run_dir / "tracking.json").exists() == is_logged


# --- MLflow ----------------------------------------------------------------------------------------------------------


def read_mlflow(uri: str):
    """The client, and the only run of experiment `letters`."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("letters").experiment_id])
    return client, run


def steps_of(client, run, metric: str) -> dict[int, float]:
    return {m.step: m.value for m in client.get_metric_history(run.info.run_id, metric)}


@pytest.mark.slow
def test_mlflow_in_a_sqlite_file_and_resumed(run_dir: Path):
    printed, stderr, _ = train(run_dir, "mlflow", 1, 20, "interrupted", HF_TOKEN=SECRET)
    assert stderr == ""
    uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    assert printed["url"] == printed["url afterwards"] == f"mlflow ui --backend-store-uri '{uri}'"
    client, run = read_mlflow(uri)
    assert (run.info.run_name, run.info.status) == ("first", "KILLED")
    assert steps_of(client, run, "loss") == {step: 1 / step for step in range(1, 21)}
    assert set(steps_of(client, run, "learning_rate")) == set(range(1, 21))  # NaN does not stop it
    assert "peak_gpu_gib" not in run.data.metrics
    assert run.data.params["train.max_steps"] == "20"
    assert run.data.params["model.name"] == "tiny:qwen2"
    assert run.data.params["checkpoint.resume"] == "auto"
    assert 250 <= len(run.data.params["data.prompt_template"]) < len(LONG)
    stored = run_dir.parent / "mlartifacts" / run.info.run_id / "artifacts"
    assert (stored / "config.yaml").read_bytes() == (run_dir / "config.yaml").read_bytes()
    assert (stored / "plots" / "loss.png").read_bytes() == b"picture"

    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    origin = {"mlflow.source.name": "pytorch-ddp/train.py", "mlflow.source.type": "LOCAL", "precision": "fp16",
              "project": "pytorch-ddp", "model": "tiny:qwen2", "data": "pydoc",
              "mlflow.source.git.commit": "0a1b2c"}  # fmt: skip
    assert origin.items() <= run.data.tags.items()
    assert run.data.tags["mlflow.user"]

    _, stderr, _ = train(run_dir, "mlflow", 21, 30)
    assert stderr == ""
    client, resumed = read_mlflow(uri)
    assert resumed.info.run_id == run.info.run_id == json.loads((run_dir / "tracking.json").read_text())["run_id"]
    assert resumed.info.status == "FINISHED"
    assert steps_of(client, resumed, "loss") == {step: 1 / step for step in range(1, 31)}
    assert resumed.data.params["train.max_steps"] == "20"
    assert resumed.data.tags["resumed.train.max_steps"] == "30"

    cfg = BaseConfig()
    cfg.tracking.backend, cfg.tracking.project = "mlflow", "letters"
    (run_dir / "eval.json").write_text("{}")
    log_results(cfg, run_dir, {"eval/base/loss": 3.5, "eval/fine_tuned/loss": 2.25}, 30, [run_dir / "eval.json"])
    evaluated = client.get_run(run.info.run_id)
    assert evaluated.info.status == "FINISHED"
    assert steps_of(client, evaluated, "eval/fine_tuned/loss") == {30: 2.25}
    assert evaluated.data.metrics["eval/base/loss"] == 3.5
    assert (stored / "eval.json").is_file()
    assert_nowhere(SECRET, run_dir.parent, stderr, *printed.values())


@pytest.mark.slow
def test_runs_that_start_together_are_all_in_the_file(tmp_path: Path):
    arguments = ["mlflow", "1", "20", "completed", "20"]
    loop = "print('ready', flush=True); input()\n" + LOOP.replace("    PAUSE", "    time.sleep(0.05)")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"import mlflow\n{loop}", str(tmp_path / f"trial-{number}"), *arguments],
            env=environment(tmp_path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [line for p in processes for line in p.communicate(timeout=120)[0].splitlines() if "warning" in line] == []
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("letters").experiment_id])
    assert sorted(run.info.run_name for run in runs) == [f"trial-{number}" for number in range(4)]
    for run in runs:
        assert steps_of(client, run, "loss") == {step: 1 / step for step in range(1, 21)}


@pytest.fixture
def mlflow_server(tmp_path: Path):
    """A real `mlflow server`: its address and its process."""
    port = free_port()
    command = f"mlflow server --host 127.0.0.1 --port {port} --workers 1 --artifacts-destination served"
    process = subprocess.Popen(
        [sys.executable, "-m", *command.split(), "--backend-store-uri", "sqlite:///server.db"],
        env=environment(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, "mlflow server did not start"
                time.sleep(0.2)
        yield address, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_mlflow_with_a_server_that_then_hangs(run_dir: Path, mlflow_server):
    address, server = mlflow_server
    with_password = {"MLFLOW_TRACKING_USERNAME": "alice", "MLFLOW_TRACKING_PASSWORD": SECRET}
    printed, stderr, _ = train(run_dir, "mlflow", status="failed", MLFLOW_TRACKING_URI=address, **with_password)
    assert stderr == ""
    client, run = read_mlflow(address)
    assert printed["url"] == f"{address}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    assert run.info.status == "FAILED"
    assert steps_of(client, run, "loss") == {step: 1 / step for step in range(1, 21)}
    assert {p.name for p in run_dir.parent.parent.rglob("served/**/*.*")} == {"config.yaml", "loss.png"}
    assert not (run_dir.parent / "mlflow.db").exists()
    assert_nowhere(SECRET, run_dir, stderr, *printed.values())

    # Stopped, not ended: connections are accepted and then nothing comes back, the worst that a server can do.
    pause = f"if step == 25: import os, signal; os.killpg({server.pid}, signal.SIGSTOP)"
    printed, stderr, _ = train(run_dir, "mlflow", 21, 40, pause=pause, patience=5, MLFLOW_TRACKING_URI=address)
    assert_one_warning(stderr, "mlflow")
    assert str(run_dir / "metrics.jsonl") in stderr
    assert float(printed["seconds"]) < 12  # with the import, which takes 1 to 5 s
    assert float(printed["slowest log"]) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("password", [SECRET, "p@ss/w ord#7"])
def test_mlflow_with_no_server(run_dir: Path, password: str):
    uri = f"http://alice:{password}@127.0.0.1:{free_port()}"
    printed, stderr, seconds = train(run_dir, "mlflow", MLFLOW_TRACKING_URI=uri)
    assert_one_warning(stderr, "mlflow")
    assert float(printed["seconds"]) < 15
    assert seconds < 25
    assert_nowhere(password, run_dir, stderr, *printed.values())
    assert not any(part in stderr for part in ("alice", "w ord", "p%40ss"))


# --- W&B -------------------------------------------------------------------------------------------------------------


def segments(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_wandb_offline_and_resumed(run_dir: Path):
    printed, stderr, _ = train(run_dir, "wandb", 1, 20, "interrupted", HF_TOKEN=SECRET)
    assert stderr == ""
    assert printed["url"] == f"wandb sync '{run_dir}/wandb'/offline-run-*"
    (segment,) = segments(run_dir)
    records = read_wandb(segment)
    assert {step: row["loss"] for step, row in history(records).items()} == {s: 1 / s for s in range(1, 21)}
    started = next(r.run for r in records if r.HasField("run"))
    assert (started.project, started.display_name) == ("letters", "first")
    settings = config(records)
    assert settings["model.name"] == "tiny:qwen2"
    assert settings["train.max_steps"] == 20
    assert settings["data.prompt_template"] == LONG
    saved = {f.path for r in records for f in r.files.files}
    assert {"first/config.yaml", "first/plots/loss.png"} <= saved
    assert not {path for path in saved if path.startswith("code") or path in ("requirements.txt", "output.log")}
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [130]

    _, stderr, _ = train(run_dir, "wandb", 21, 30)
    assert stderr == ""
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    assert run_id == started.run_id
    both = [read_wandb(file) for file in segments(run_dir)]
    assert [next(r.run.run_id for r in records if r.HasField("run")) for records in both] == [run_id, run_id]
    assert sorted(history(both[0]) | history(both[1])) == list(range(1, 31))
    assert [r.exit.exit_code for r in both[1] if r.HasField("exit")] == [0]
    assert_nowhere(SECRET, run_dir, stderr, *printed.values())


@pytest.mark.slow
def test_wandb_offline_by_its_own_variable_keeps_the_key_to_itself(run_dir: Path):
    printed, stderr, _ = train(run_dir, "wandb", WANDB_MODE="offline", WANDB_API_KEY=SECRET)
    assert stderr == ""
    assert len(segments(run_dir)) == 1
    assert_nowhere(SECRET, run_dir, stderr, *printed.values())


class WandbServer:
    """Answers as W&B's server does to a run that is created, logged and finished; nothing else is known to it."""

    def __init__(self):
        self.history: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.exit_code: int | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(outer.graphql(request) if self.path == "/graphql" else outer.file_stream(request))

            def do_PUT(self):
                outer.files[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
                self.answer({})

            def answer(self, content: dict):
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *message):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def graphql(self, request: dict) -> dict:
        if "createRunFiles" in request["query"]:
            files = [{"name": f, "uploadUrl": f"{self.url}/{f}"} for f in request["variables"]["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        if "upsertBucket" not in request["query"]:
            return {"data": {}}
        name = request["variables"]["name"]
        project = {"id": "p", "name": "letters", "entity": {"id": "e", "name": "alice"}}
        bucket = {"id": "b", "name": name, "displayName": name, "historyLineCount": 0, "project": project}
        return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}

    def file_stream(self, request: dict) -> dict:
        if "files" in request and "wandb-history.jsonl" in (request["files"] or {}):
            self.history += map(json.loads, request["files"]["wandb-history.jsonl"]["content"])
        if request.get("complete"):
            self.exit_code = request["exitcode"]
        return {}

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.mark.slow
def test_wandb_with_a_server(run_dir: Path):
    with WandbServer() as server:
        printed, stderr, _ = train(run_dir, "wandb", status="failed", WANDB_BASE_URL=server.url, WANDB_API_KEY=SECRET)
    assert stderr == ""
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    assert printed["url"] == f"{server.url}/alice/letters/runs/{run_id}"
    assert {row["_step"]: row["loss"] for row in server.history} == {step: 1 / step for step in range(1, 21)}
    assert server.exit_code == 1
    assert server.files["/first/config.yaml"] == (run_dir / "config.yaml").read_bytes()
    assert server.files["/first/plots/loss.png"] == b"picture"
    assert not {"/requirements.txt", "/output.log"} & set(server.files)
    assert_nowhere(SECRET, run_dir, stderr, *printed.values())


@pytest.mark.slow
def test_wandb_with_a_server_that_goes_away(run_dir: Path):
    with WandbServer() as server:
        # After the start, the loop waits for a file that this process writes when it has closed the server.
        pause = "while step == 5 and not (run_dir / 'closed').exists(): time.sleep(0.05)"

        def close_when_started():
            while not (run_dir / "tracking.json").exists():
                time.sleep(0.05)
            server.http.shutdown()
            server.http.server_close()
            (run_dir / "closed").touch()

        threading.Thread(target=close_when_started, daemon=True).start()
        keys = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": SECRET}
        printed, stderr, seconds = train(run_dir, "wandb", pause=pause, patience=6, **keys)
    assert_one_warning(stderr, "wandb")
    assert "wandb sync --include-online" in stderr
    assert float(printed["seconds"]) < 10
    assert seconds < 15  # the exit does not wait for the server either
    import wandb

    if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:  # older ones write when 32 KiB are full
        (log,) = run_dir.glob("wandb/run-*/*.wandb")
        assert set(history(read_wandb(log))) == set(range(1, 21))  # `wandb sync` has everything


@pytest.mark.slow
def test_wandb_with_no_server(run_dir: Path):
    address = f"http://127.0.0.1:{free_port()}"
    printed, stderr, seconds = train(
        run_dir, "wandb", WANDB_BASE_URL=address, WANDB_API_KEY=SECRET, WANDB_INIT_TIMEOUT="4"
    )
    assert_one_warning(stderr, "wandb")
    assert float(printed["seconds"]) < 22
    assert seconds < 27
    assert_nowhere(SECRET, run_dir, stderr, *printed.values())
