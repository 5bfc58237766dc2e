"""Experiment tracking with MLflow or W&B, by the main process only, never in the way of the training.

A thread of its own talks to the library: `log` costs microseconds, and a server that is slow, down or full can neither
delay the training by more than `PATIENCE` seconds in all nor end it. What it misses is in `metrics.jsonl` anyway.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import queue
import re
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
from packaging.version import Version

from common.config import BaseConfig, flatten
from common.errors import UserError

PATIENCE = 20.0  # seconds that the training waits for its tracker, over the whole run
START_PATIENCE = 10.0  # of these, at most so many for the start
FLUSH_SECONDS = 2.0  # metrics go out in batches: MLflow needs 4 ms for one value, 0.1 ms for one of a thousand


class Row(NamedTuple):
    """What one call of `Tracker.log` hands to the backend. `time` is in seconds since the epoch."""

    metrics: dict[str, float]
    step: int
    time: float


class Backend(Protocol):
    """A tracking library; everything but the constructor is called by the tracker's thread and may raise or block."""

    url: str  # where to look
    remedy: str  # where to find what did not get through

    def start(self) -> None: ...

    def log(self, rows: list[Row]) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def finish(self, status: str) -> None: ...

    def abandon(self) -> None: ...


def check_tracker(cfg: BaseConfig) -> None:
    """Raise `UserError` if the library of `tracking.backend` is not there, before a run has begun."""
    backend = cfg.tracking.backend
    if backend != "none" and importlib.util.find_spec(backend) is None:
        raise _missing(backend, ImportError(f"No module named {backend!r}"))


def start_tracker(cfg: BaseConfig, run_dir: Path, *, enabled: bool) -> Tracker:
    """The tracker that `cfg.tracking.backend` names, with a run named like `run_dir` that holds the config.

    A resumed run (one with a `run_dir/tracking.json`) goes on in the same tracker run. Pass `enabled=False` on every
    rank but the main one: nothing is imported and every call does nothing. Raises `UserError` for a missing library.
    """
    backends = {"mlflow": MlflowBackend, "wandb": WandbBackend}
    if not enabled or cfg.tracking.backend == "none":
        return Tracker("none", None)
    return Tracker(cfg.tracking.backend, backends[cfg.tracking.backend](cfg, run_dir.resolve()))


class Tracker:
    """Hands metrics and files to a backend in the background; reports its first failure and then switches it off."""

    def __init__(self, name: str, backend: Backend | None):
        self._name, self._backend = name, backend
        self._rows: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._artifacts: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._status = ""
        self._wake = threading.Event()
        self._started = threading.Event()
        self._lock = threading.Lock()
        self._patience = PATIENCE
        if backend:
            # A daemon: a thread that is stuck in a dead connection does not keep the process alive.
            self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
            self._thread.start()
            self._wait(self._started.wait, START_PATIENCE)  # a slower start goes on beside the training

    @property
    def url(self) -> str:
        """Where to look, also after `finish`: a command or an address; empty when there is no tracker, or none yet."""
        return _without_secrets(self._backend.url) if self._backend else ""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record `metrics` at optimizer step `step`. Never blocks, never raises; values of None are left out."""
        if self._backend:
            self._rows.put(Row({k: float(v) for k, v in metrics.items() if v is not None}, step, time.time()))

    def log_artifacts(self, *paths: Path) -> None:
        """Upload files or folders, which must stay as they are until `finish`."""
        for path in paths:
            self._artifacts.put(path)

    def finish(self, status: str) -> None:
        """Send what is left and close the run; a second call does nothing.

        `status` is completed, stopped (by a search, early), interrupted (by a signal or the clock) or failed.
        """
        backend = self._backend
        if not backend or self._status:
            return
        self._status = status
        self._wake.set()
        self._wait(self._thread.join, PATIENCE)
        if self._thread.is_alive():
            self._fail(f"no answer in time; {backend.remedy}")

    def _wait(self, wait: Any, limit: float) -> None:
        began = time.monotonic()
        wait(max(0.0, min(limit, self._patience)))
        self._patience -= time.monotonic() - began

    def _work(self) -> None:
        backend = self._backend
        try:
            backend.start()
            self._started.set()
            finishing = False
            while not finishing:
                finishing = self._wake.wait(FLUSH_SECONDS)
                if rows := list(_drain(self._rows)):
                    backend.log(rows)
                for path in _drain(self._artifacts):
                    backend.log_artifact(path)
            backend.finish(self._status)
        except Exception as error:  # whatever a tracking library raises, the training goes on
            self._fail(_without_secrets(" ".join(str(error).split()))[:300] or type(error).__name__)
            self._started.set()

    def _fail(self, reason: str) -> None:
        with self._lock:  # the thread may fail in the moment in which `finish` gives it up
            backend, self._backend = self._backend, None
        if backend:
            print(
                f"warning: tracking.backend={self._name} is off from here on, the training is not affected: {reason}",
                file=sys.stderr,
                flush=True,
            )
            backend.abandon()


class MlflowBackend:
    """MLflow through its client, without global state; a SQLite file beside the run where no server is named."""

    STATUS = {"completed": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}  # noqa: RUF012

    def __init__(self, cfg: BaseConfig, run_dir: Path):
        self._cfg, self._run_dir = cfg, run_dir
        # MLflow's own defaults would retry a dead server for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow import MlflowClient
            from mlflow.utils.logging_utils import disable_logging
        except ImportError as error:
            raise _missing("mlflow", error) from None
        disable_logging()  # also tracebacks of what is reported in one line
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.parent / 'mlflow.db'}"
        self.url = f"mlflow ui --backend-store-uri {shlex.quote(self._uri)}"
        self.remedy = f"all metrics are in {run_dir / 'metrics.jsonl'}"
        self._connect = lambda: MlflowClient(tracking_uri=self._uri)

    def start(self) -> None:
        logging.disable(logging.INFO)  # MLflow 2 turns on dozens of loggers when it makes a database
        try:
            self._client = self._connect()
        finally:
            logging.disable(logging.NOTSET)
        run = self._earlier_run()
        if run:
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self._client.create_run(self._experiment_id(), run_name=self._run_dir.name)
        self._run_id = run.info.run_id
        _save_run_id(self._run_dir, "mlflow", self._run_id)
        if self._uri.startswith("http"):
            self.url = f"{self._uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{self._run_id}"
        self._log_params(run.data.params)
        self.log_artifact(self._run_dir / "config.yaml")

    def log(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(k, v, int(r.time * 1000), r.step) for r in rows for k, v in r.metrics.items()]
        for start in range(0, len(metrics), 1000):  # the most that a server takes at once
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])

    def log_artifact(self, path: Path) -> None:
        self._client.log_artifact(self._run_id, str(path))

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._run_id, self.STATUS[status])

    def abandon(self) -> None:
        """Nothing outlives the process."""

    def _earlier_run(self) -> Any:
        from mlflow.exceptions import MlflowException

        run_id = _saved_run_id(self._run_dir, "mlflow")
        try:
            return self._client.get_run(run_id) if run_id else None
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # another server or database than last time
                return None
            raise

    def _experiment_id(self) -> str:
        name = self._cfg.tracking.project
        if experiment := self._client.get_experiment_by_name(name):
            return experiment.experiment_id
        # Only a server knows where its artifacts belong.
        own_files = "MLFLOW_TRACKING_URI" not in os.environ
        return self._client.create_experiment(
            name, artifact_location=(self._run_dir.parent / "mlartifacts").as_uri() if own_files else None
        )

    def _log_params(self, known: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        values = {name: str(value)[:MAX_PARAM_VAL_LENGTH] for name, value in flatten(self._cfg).items()}
        # MLflow never changes a parameter: what a resumed run does differently becomes a tag.
        params = [Param(name, value) for name, value in values.items() if name not in known]
        tags = [RunTag(f"resumed.{k}", v) for k, v in values.items() if known.get(k, v) != v]
        for start in range(0, len(params), 100):  # the most that a server takes at once
            self._client.log_batch(self._run_id, params=params[start : start + 100])
        self._client.log_batch(self._run_id, tags=tags)


class WandbBackend:
    """W&B with its usual environment variables; offline, in the run folder, when it has no key."""

    EXIT_CODE = {"completed": 0, "stopped": 0, "interrupted": 130, "failed": 1}  # noqa: RUF012

    def __init__(self, cfg: BaseConfig, run_dir: Path):
        self._cfg, self._run_dir = cfg, run_dir
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "10")
        os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "2")  # what `wandb sync` finds after a kill
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(int(PATIENCE)))  # also for the exit of a run that crashed
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", error) from None
        self._wandb = wandb
        self.url, self.remedy = "", f"all metrics are in {run_dir / 'metrics.jsonl'}"

    def start(self) -> None:
        from requests.utils import get_netrc_auth

        wandb = self._wandb
        requirements = "x_save_requirements" if Version(wandb.__version__) >= Version("0.19") else "_save_requirements"
        quiet = wandb.Settings(
            silent=True,
            console="off",  # the terminal's lines are in no need of a copy, and may hold anything
            save_code=False,
            disable_code=True,
            disable_git=True,
            **{requirements: False},  # environment.json has the versions
        )
        known = wandb.setup(quiet).settings
        has_key = known.api_key or known.identity_token_file or get_netrc_auth(known.base_url)
        self._run = wandb.init(
            project=self._cfg.tracking.project,
            name=self._run_dir.name,
            dir=str(self._run_dir),
            id=_saved_run_id(self._run_dir, "wandb") or secrets.token_hex(4),
            resume="allow",
            mode=os.environ.get("WANDB_MODE") or (None if has_key else "offline"),  # 0.18 overlooks it
            settings=quiet,
        )
        _save_run_id(self._run_dir, "wandb", self._run.id)
        self._run.config.update(flatten(self._cfg), allow_val_change=True)  # a resumed run may differ
        self.log_artifact(self._run_dir / "config.yaml")
        folder = shlex.quote(str(self._run_dir / "wandb"))
        self.url = f"wandb sync {folder}/offline-run-*" if self._run.offline else self._run.url
        self.remedy += f"; what W&B has on disk goes out with: wandb sync --include-online {folder}/*run-*"

    def log(self, rows: list[Row]) -> None:
        for row in rows:
            self._run.log(row.metrics, step=row.step)

    def log_artifact(self, path: Path) -> None:
        # One folder level is kept: W&B has a config.yaml of its own at the top.
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                self._run.save(str(file), base_path=str(path.resolve().parent.parent), policy="now")

    def finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=self.EXIT_CODE[status])

    def abandon(self) -> None:
        """End W&B's service process, which would hold up the exit for as long as the server is away."""
        for child in psutil.Process().children():
            if "wandb" in child.name():
                child.kill()
        with contextlib.suppress(Exception, SystemExit):  # or its exit hook would print a traceback
            self._wandb.teardown()


def _drain(waiting: queue.SimpleQueue) -> Iterator[Any]:
    for _ in range(waiting.qsize()):
        yield waiting.get()


def _missing(package: str, error: ImportError) -> UserError:
    return UserError(
        f"tracking.backend={package} needs the package {package} ({error}): "
        f"pip install {package}, or set tracking.backend=none"
    )


def _saved_run_id(run_dir: Path, backend: str) -> str | None:
    path = run_dir / "tracking.json"
    saved = json.loads(path.read_text()) if path.is_file() else {}
    return saved.get("run_id") if saved.get("backend") == backend else None


def _save_run_id(run_dir: Path, backend: str, run_id: str) -> None:
    (run_dir / "tracking.json").write_text(json.dumps({"backend": backend, "run_id": run_id}) + "\n")


def _without_secrets(text: str) -> str:
    """`text` without the user and password of an address, as in postgresql://user:password@host."""
    return re.sub(r"//[^/@\s]+@", "//", text)
