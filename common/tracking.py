"""Experiment tracking with MLflow or W&B, by the main process only, never in the way of the training.

A thread of its own talks to the library: `log` costs microseconds, and a server that is slow, down or full can neither
delay the training by more than `PATIENCE` seconds in all nor end it. Nor can a library that fails when it is imported,
started or closed. What it misses is in `metrics.jsonl` anyway.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import json
import logging
import os
import queue
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
from huggingface_hub.utils import WeakFileLock
from packaging.version import Version

from common.config import BaseConfig, flatten
from common.errors import UserError
from common.files import write_json
from common.redaction import encoded, without_secrets
from common.report import read_json

PATIENCE = 20.0  # seconds that the training waits for its tracker, over the whole run
START_PATIENCE = 10.0  # of these, at most this many for the start
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

    def annotate(self, metrics: dict[str, float], step: int, files: list[Path]) -> None: ...

    def log(self, rows: list[Row]) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def finish(self, status: str) -> None: ...

    def abandon(self) -> None: ...


def check_tracker(cfg: BaseConfig) -> None:
    """Raise `UserError` if the library of `tracking.backend` is not there, before a run has begun."""
    backend = cfg.tracking.backend
    if backend != "none" and importlib.util.find_spec(backend) is None:
        raise UserError(
            f"tracking.backend={backend} needs the package {backend}, which is not installed: pip install {backend}, "
            f"or set tracking.backend=none"
        )


def start_tracker(cfg: BaseConfig, run_dir: Path, project: str) -> Tracker:
    """The tracker that `cfg.tracking.backend` names, with a run named like `run_dir` that holds the config.

    A resumed run (one with a `run_dir/tracking.json`) continues the same tracker run. Never raises.
    """
    return Tracker(cfg.tracking.backend, _backend(cfg, run_dir, project))


def log_results(cfg: BaseConfig, run_dir: Path, metrics: dict[str, float], step: int, files: list[Path]) -> None:
    """Add figures that were found after the training, and files, to the training's own tracker run, if it has one.

    Never raises, and takes at most `PATIENCE` seconds.
    """
    make = _backend(cfg, run_dir, "")
    if make is None or not _saved_run_id(run_dir, cfg.tracking.backend):
        return
    failures: list[str] = []

    def annotate() -> None:
        try:
            make().annotate(metrics, step, files)
        except BaseException as error:
            failures.append(_first_words(error))

    thread = threading.Thread(target=annotate, name="tracker", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive() or failures:
        why = failures[0] if failures else "no answer in time"
        print(
            f"warning: tracking.backend={cfg.tracking.backend} did not get these results: {why}; they are in "
            f"{run_dir / 'eval.json'}",
            file=sys.stderr,
            flush=True,
        )


def _backend(cfg: BaseConfig, run_dir: Path, project: str) -> Callable[[], Backend] | None:
    """What makes the backend; None if nothing is to be tracked, also by W&B's own variables."""
    name, run_dir = cfg.tracking.backend, run_dir.resolve()
    if name == "none" or (name == "wandb" and _wandb_is_disabled()):
        return None
    backends: dict[str, Callable[..., Backend]] = {"mlflow": MlflowBackend, "wandb": WandbBackend}
    return lambda: backends[name](cfg, run_dir, project)


def _wandb_is_disabled() -> bool:
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    return disabled or os.environ.get("WANDB_MODE") == "disabled"


class Tracker:
    """Hands metrics and files to a backend in the background; reports its first failure and then switches it off."""

    def __init__(self, name: str, make: Callable[[], Backend] | None):
        self._name, self._backend = name, None
        self._rows: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._artifacts: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._status = ""
        self._wake = threading.Event()
        self._started = threading.Event()
        self._lock = threading.Lock()
        self._patience = PATIENCE
        if make is None:
            return
        try:
            self._backend = make()
        except (Exception, SystemExit) as error:  # a broken installation, a cache folder that is not writable ...
            self._warn(f"{_first_words(error)}; all metrics are in metrics.jsonl")
            return
        # A daemon: a thread that is stuck in a dead connection does not keep the process alive.
        self._thread = threading.Thread(target=self._work, args=(self._backend,), name="tracker", daemon=True)
        self._thread.start()
        self._wait(self._started.wait, START_PATIENCE)  # a slower start continues during the training

    @property
    def url(self) -> str:
        """Where to look, also after `finish`: a command or an address; empty when there is no tracker, or none yet."""
        return without_secrets(self._backend.url or "") if self._backend else ""

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

    def _work(self, backend: Backend) -> None:
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
        except BaseException as error:  # whatever a tracking library raises, SystemExit too, the training continues
            self._fail(_first_words(error))
        finally:
            self._started.set()

    def _fail(self, reason: str) -> None:
        with self._lock:  # the thread may fail in the moment in which `finish` gives it up
            backend, self._backend = self._backend, None
        if backend:
            self._warn(reason)
            with contextlib.suppress(Exception, SystemExit):
                backend.abandon()

    def _warn(self, reason: str) -> None:
        print(
            f"warning: tracking.backend={self._name} is off from here on, the training is not affected: {reason}",
            file=sys.stderr,
            flush=True,
        )


class MlflowBackend:
    """MLflow through its client, without global state; a SQLite file next to the run if no server is named."""

    # What MLflow 3 asks of every experiment: "Model training", not "GenAI". It decides which charts and tabs there are.
    MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # noqa: RUF012
    STATUS = {"completed": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}  # noqa: RUF012

    def __init__(self, cfg: BaseConfig, run_dir: Path, project: str):
        self._cfg, self._run_dir, self._project = cfg, run_dir, project
        # MLflow's own defaults would retry a dead server for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.utils.logging_utils import disable_logging

        disable_logging()  # also tracebacks of what is reported in one line
        self._uri = encoded(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.parent / 'mlflow.db'}")
        self.url = f"mlflow ui --backend-store-uri {shlex.quote(self._uri)}"
        self.remedy = f"all metrics are in {run_dir / 'metrics.jsonl'}"
        self._connect = lambda: MlflowClient(tracking_uri=self._uri)

    def start(self) -> None:
        with self._alone_with_the_file():
            self._open()
            run = self._earlier_run()
            if run:
                self._client.update_run(run.info.run_id, status="RUNNING")
            else:
                run = self._client.create_run(self._experiment_id(), run_name=self._run_dir.name, tags=self._tags())
        self._run_id = run.info.run_id
        _save_run_id(self._run_dir, "mlflow", self._run_id)
        if self._uri.startswith("http"):
            self.url = f"{self._uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{self._run_id}"
        self._log_params(run.data.params)
        self.log_artifact(self._run_dir / "config.yaml")

    def annotate(self, metrics: dict[str, float], step: int, files: list[Path]) -> None:
        with self._alone_with_the_file():
            self._open()
        if run := self._earlier_run():
            self._run_id = run.info.run_id
            self.log([Row(metrics, step, time.time())])
            for file in files:
                self.log_artifact(file)

    def _open(self) -> None:
        logging.disable(logging.INFO)  # MLflow 2 turns on dozens of loggers when it makes a database
        try:
            self._client = self._connect()
        finally:
            logging.disable(logging.NOTSET)

    def _alone_with_the_file(self) -> contextlib.AbstractContextManager:
        """One process at a time makes a SQLite file, its tables and the experiment: trials start together."""
        if not self._uri.startswith("sqlite:///"):  # a server sees to that
            return contextlib.nullcontext()
        file = Path(self._uri.removeprefix("sqlite:///").partition("?")[0])
        return WeakFileLock(file.with_name(f".{file.name}.lock"))

    def _tags(self) -> dict[str, str]:
        """What MLflow's table shows of a run's origin, and what its search finds runs by."""
        environment = read_json(self._run_dir / "environment.json")
        tags = {
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": f"{self._project}/train.py" if self._project else sys.argv[0],
            "mlflow.source.git.commit": (environment.get("git_commit") or "").partition(" ")[0],
            "mlflow.user": getpass.getuser(),
            "project": self._project,
            "model": self._cfg.model.name,
            "data": self._cfg.data.name,
            "precision": environment.get("precision", "").partition(":")[0],
        }
        return {name: value for name, value in tags.items() if value}

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
        from mlflow.exceptions import MlflowException

        name = self._cfg.tracking.project
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            # Only a server knows where its artifacts belong.
            own_files = not os.environ.get("MLFLOW_TRACKING_URI")
            folder = (self._run_dir.parent / "mlartifacts").as_uri() if own_files else None
            try:
                return self._client.create_experiment(name, artifact_location=folder, tags=self.MODEL_TRAINING)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = self._client.get_experiment_by_name(name)  # another process was faster
        for tag, value in self.MODEL_TRAINING.items():
            if tag not in experiment.tags:
                self._client.set_experiment_tag(experiment.experiment_id, tag, value)
        return experiment.experiment_id

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

    def __init__(self, cfg: BaseConfig, run_dir: Path, project: str):
        self._cfg, self._run_dir, self._project = cfg, run_dir, project
        if not os.environ.get("WANDB_MODE", "offline"):
            del os.environ["WANDB_MODE"]  # set to nothing, which W&B refuses
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "10")
        os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "2")  # what `wandb sync` finds after a kill
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(int(PATIENCE)))  # also for the exit of a run that crashed
        import wandb

        self._wandb = wandb
        self.url, self.remedy = "", f"all metrics are in {run_dir / 'metrics.jsonl'}"

    def start(self) -> None:
        self._init()
        _save_run_id(self._run_dir, "wandb", self._run.id)
        self._run.config.update(flatten(self._cfg), allow_val_change=True)  # a resumed run may differ
        self.log_artifact(self._run_dir / "config.yaml")
        folder = shlex.quote(str(self._run_dir / "wandb"))
        self.url = f"wandb sync {folder}/offline-run-*" if self._run.offline else self._run.url
        self.remedy += f"; what W&B has on disk goes out with: wandb sync --include-online {folder}/*run-*"

    def annotate(self, metrics: dict[str, float], step: int, files: list[Path]) -> None:
        self._init()
        self._run.summary.update(metrics)
        for file in files:
            self.log_artifact(file)
        self._run.finish()

    def _init(self) -> None:
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
            tags=[self._project] if self._project else None,
            settings=quiet,
        )

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
        self._wandb.teardown()  # or its exit hook would print a traceback


def _drain(waiting: queue.SimpleQueue) -> Iterator[Any]:
    for _ in range(waiting.qsize()):
        yield waiting.get()


def _first_words(error: BaseException) -> str:
    return without_secrets(" ".join(str(error).split()))[:300] or type(error).__name__


def _saved_run_id(run_dir: Path, backend: str) -> str | None:
    path = run_dir / "tracking.json"
    with contextlib.suppress(OSError, ValueError):  # none there, or damaged: a new tracker run then
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.get("backend") == backend:
            return saved.get("run_id")
    return None


def _save_run_id(run_dir: Path, backend: str, run_id: str) -> None:
    write_json(run_dir / "tracking.json", {"backend": backend, "run_id": run_id})
