"""Uploads, the check before a training, and explained downloads: the real clients against a Hub on this machine."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import HubServer

from common.hub import is_hub_id

REPOSITORY = Path(__file__).resolve().parent.parent
WRITE, READ, WRONG = "hf_" + "w" * 34, "hf_" + "r" * 34, "hf_" + "x" * 34
TOKENS = {WRITE: ("alice", "write"), READ: ("bob", "read")}
CONFIG = '{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 8, "vocab_size": 16}'

PUSH = """
import sys
from pathlib import Path
from common.config import BaseConfig
from common.hub import push_to_hub
cfg = BaseConfig()
cfg.hub.repo_id = sys.argv[1]
folder = Path(sys.argv[2])
print("returned", push_to_hub(cfg, folder.parent, folder, path_in_repo=sys.argv[3]))
"""
IMPATIENT_PUSH = "import common.hub; common.hub.BACKOFF_SECONDS = 0.1\n" + PUSH
CHECK = """
import sys
from common.config import BaseConfig
from common.errors import UserError
from common.hub import check_can_push
cfg = BaseConfig()
cfg.hub.repo_id = sys.argv[1]
try:
    check_can_push(cfg)
    print("fine")
except UserError as error:
    print("error:", error)
"""
# One line for each case of kind, name, revision and token; one process for all, as transformers imports for seconds.
LOAD = """
import json, os, sys
from datasets import load_dataset
from transformers import AutoConfig
from common.errors import UserError
from common.hub import explain_hub_error
for kind, name, revision, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token or ""
    try:
        if kind == "model":
            print(AutoConfig.from_pretrained(name, revision=revision).model_type)
        else:
            print(load_dataset(name, split="train")[0])
    except Exception as error:
        explained = explain_hub_error(error, kind, name)
        assert isinstance(explained, UserError)
        print(explained)
"""


@pytest.fixture
def hub(tmp_path: Path):
    with HubServer(tmp_path / "hub", tokens=TOKENS, gated={"meta/llama": ["alice"], "meta/rows": ["alice"]}) as server:
        (tmp_path / "gpt").mkdir()
        (tmp_path / "gpt" / "config.json").write_text(CONFIG)
        server.add_model("meta/llama", tmp_path / "gpt")
        server.add_model("open/gpt", tmp_path / "gpt")
        server.add_dataset("meta/rows", {"train.jsonl": b'{"text": "a"}\n'})
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder like a run's model/: small text files and a binary one."""
    folder = tmp_path / "the run" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(CONFIG)
    (folder / "README.md").write_text("# Card\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    return folder


def run(hub: HubServer, code: str, *arguments: object, token: str | None = None, **env: str):
    """`code` in a process that knows the Hub and nothing about this machine's tokens; the result and its seconds."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "KAGGLE"))}
    settings = hub.environment(hub.root.parent / "hf_home", token) | {"PYTHONPATH": str(REPOSITORY)} | env
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=base | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for secret in TOKENS.keys() | {WRONG}:
        assert secret not in done.stdout + done.stderr
    return done, time.monotonic() - began


def commits(hub: HubServer) -> list[int]:
    return [r.status for r in hub.requests if "/commit/" in r.path]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- upload ----------------------------------------------------------------------------------------------------------


def test_push_creates_a_private_repository_and_uploads_in_one_commit(hub: HubServer, model: Path):
    done, _ = run(hub, PUSH, "alice/tuned", model, "", token=WRITE)
    assert f"returned {hub.url}/alice/tuned" in done.stdout
    uploaded = contents(hub.root / "models/alice/tuned")
    uploaded.pop(".gitattributes", None)
    assert uploaded == contents(model)
    assert commits(hub) == [200]
    look = "from huggingface_hub import HfApi; print(HfApi().repo_exists('alice/tuned'))"
    assert run(hub, look)[0].stdout == "False\n"  # for somebody without a token: it is private


def test_push_into_a_folder_of_an_existing_repository(hub: HubServer, model: Path):
    hub.add_model("alice/tuned", hub.root.parent / "gpt")
    run(hub, PUSH, "alice/tuned", model, "checkpoints", token=WRITE)
    uploaded = contents(hub.root / "models/alice/tuned")
    assert uploaded["checkpoints/model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert "config.json" in uploaded  # what was there stays


def test_push_retries_what_is_temporary_and_waits_as_long_as_the_server_asks(hub: HubServer, model: Path):
    hub.fault(429, path_contains="/repos/create", retry_after=1)
    done, seconds = run(hub, IMPATIENT_PUSH, "alice/tuned", model, "", token=WRITE)
    assert f"returned {hub.url}/alice/tuned" in done.stdout
    assert seconds > 1
    assert "model.safetensors" in contents(hub.root / "models/alice/tuned")


@pytest.mark.parametrize("kind", [500, 503, "drop"])
def test_push_retries_a_failed_commit(hub: HubServer, model: Path, kind: int | str):
    hub.fault(kind, path_contains="/commit/")
    done, _ = run(hub, IMPATIENT_PUSH, "alice/tuned", model, "", token=WRITE)
    assert f"returned {hub.url}/alice/tuned" in done.stdout
    assert commits(hub)[-1] == 200
    assert len(commits(hub)) == 2


@pytest.mark.parametrize(
    ("token", "repo_id", "reason"),
    [
        (None, "alice/tuned", "there is no token"),
        (WRONG, "alice/tuned", "does not accept the token"),
        (READ, "bob/tuned", "may not write there"),
        (WRITE, "carol/tuned", "may not write there"),
    ],
)
def test_push_without_the_right_is_reported_once_with_the_command_that_repeats_it(
    hub: HubServer, model: Path, token: str | None, repo_id: str, reason: str
):
    done, _ = run(hub, PUSH, repo_id, model, "", token=token)
    assert done.stdout.splitlines()[-1] == "returned None"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert reason in line
    assert "HF_TOKEN" in line
    assert len([r for r in hub.requests if r.path == "/api/repos/create"]) == 1  # never retried

    # The printed command, run as it stands by somebody who has the right, does what the upload did not.
    client, *arguments = shlex.split(line.rpartition("To repeat it: ")[2])
    base = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = base | hub.environment(hub.root.parent / "hf_home", WRITE)
    assert arguments[:2] == ["upload", repo_id]
    arguments[1] = "alice/tuned"
    subprocess.run([Path(sys.executable).parent / client, *arguments], env=env, capture_output=True, timeout=60)
    assert contents(hub.root / "models/alice/tuned").items() >= contents(model).items()


def test_push_gives_up_on_a_hub_that_stays_away(hub: HubServer, model: Path):
    hub.fault(503, path_contains="/repos/create", times=100)
    done, _ = run(hub, IMPATIENT_PUSH, "alice/tuned", model, "", token=WRITE)
    assert "returned None" in done.stdout
    assert "warning: " in done.stderr and " upload alice/tuned " in done.stderr
    assert "(3 of 4)" in done.stderr and "(4 of 4)" not in done.stderr


# --- token and check -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "repo_id", "said"),
    [
        (WRITE, "", "fine"),
        (WRITE, "alice/tuned", "fine"),
        (None, "alice/tuned", "there is no token: set HF_TOKEN"),
        (WRONG, "alice/tuned", "does not accept the token"),
        (READ, "bob/tuned", "may not write there"),
        (WRITE, "carol/tuned", "may not write there"),
        (WRITE, "tuned", "write it as owner/tuned"),
        (WRITE, "alice/my model", "not a repository's name"),
        (WRITE, "a/b/c", "not a repository's name"),
    ],
)
def test_the_check_before_the_training(hub: HubServer, token: str | None, repo_id: str, said: str):
    done, _ = run(hub, CHECK, repo_id, token=token)
    assert said in done.stdout
    assert done.stdout.startswith("fine" if said == "fine" else f"error: hub.repo_id={repo_id}")
    assert len(done.stdout.splitlines()) == 1


def test_the_check_goes_on_when_the_hub_does_not_answer(hub: HubServer):
    with socket.socket() as s:  # bound, never listening: connections are refused
        s.bind(("127.0.0.1", 0))
        done, _ = run(hub, CHECK, "alice/tuned", token=WRITE, HF_ENDPOINT=f"http://127.0.0.1:{s.getsockname()[1]}")
    assert done.stdout == "fine\n"
    assert "warning: hub.repo_id=alice/tuned could not be checked" in done.stderr


def test_the_token_comes_from_kaggles_secrets_where_there_are_some(hub: HubServer, tmp_path: Path):
    code = (
        "from common.hub import token; import hashlib; print(token() and hashlib.sha256(token().encode()).hexdigest())"
    )
    assert run(hub, code)[0].stdout == "None\n"
    # Kaggle's module, as far as its interface goes; only Kaggle's machines have the real one.
    (tmp_path / "kaggle_secrets.py").write_text(
        "class UserSecretsClient:\n"
        "    def get_secret(self, label):\n"
        f"        if label == 'HF_TOKEN': return '{WRITE}'\n"
        "        raise ValueError(label)\n"
    )
    done, _ = run(hub, CHECK, "alice/tuned", PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert done.stdout == "fine\n"
    (tmp_path / "kaggle_secrets.py").write_text(
        "class UserSecretsClient:\n    def get_secret(self, label): raise ConnectionError('no internet')\n"
    )
    assert run(hub, code, PYTHONPATH=f"{tmp_path}:{REPOSITORY}")[0].stdout == "None\n"


# --- downloads -------------------------------------------------------------------------------------------------------


def explained(hub: HubServer, cases: list[tuple], **env: str) -> list[str]:
    done, _ = run(hub, LOAD, json.dumps(cases), **env)
    return done.stdout.splitlines()


@pytest.mark.slow
def test_failed_downloads_are_explained(hub: HubServer):
    expected = {
        ("model", "open/gpt", "main", WRONG): "does not accept the token",  # first: later it is in the cache
        ("model", "open/gpt", "main", None): "gpt2",
        ("model", "meta/llama", "main", None): f"is gated: ask for access at {hub.url}/meta/llama, then set HF_TOKEN",
        ("model", "meta/llama", "main", READ): f"no access yet: ask for it at {hub.url}/meta/llama",
        ("model", "meta/llama", "main", WRITE): "gpt2",
        ("model", "open/gptt", "main", None): "model.name=open/gptt is not on the Hub: misspelt",
        ("model", "open/gptt", "main", READ): "private to others than your token's account",
        ("model", "open/gpt", "v9", None): "set model.revision",
        ("model", "./no/such", "main", None): "neither a name on the Hub (owner/name) nor something on this disk",
        ("dataset", "meta/rows", "main", None): f"data.name=meta/rows is gated: ask for access at {hub.url}/datasets/",
        ("dataset", "meta/rows", "main", READ): f"no access yet: ask for it at {hub.url}/datasets/meta/rows",
        ("dataset", "meta/rowss", "main", None): "data.name=meta/rowss is not on the Hub: misspelt",
    }
    lines = explained(hub, list(expected))
    assert len(lines) == len(expected)
    for line, said in zip(lines, expected.values(), strict=True):
        assert said in line


@pytest.mark.slow
def test_downloads_in_offline_mode_are_explained(hub: HubServer):
    cases = [("model", "open/gpt", "main", None), ("dataset", "meta/rows", "main", None)]
    for line, local in zip(explained(hub, cases, HF_HUB_OFFLINE="1"), ("local folder", "local file"), strict=True):
        assert "HF_HUB_OFFLINE forbids the download" in line
        assert local in line


def test_a_download_without_a_network_is_explained(hub: HubServer):
    code = """
from huggingface_hub import HfApi
from common.hub import explain_hub_error
try:
    HfApi().model_info("open/gpt")
except Exception as error:
    try:
        raise OSError("Can't load the configuration")  # as transformers wraps it
    except OSError as outer:
        print(explain_hub_error(outer, "model", "open/gpt"))
"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{s.getsockname()[1]}"
        done, _ = run(hub, code, HF_ENDPOINT=address)
    assert done.stdout.startswith(f"model.name=open/gpt cannot be downloaded: no answer from {address}")
    assert "local folder" in done.stdout


# --- model card ------------------------------------------------------------------------------------------------------


def test_hub_ids_are_told_from_embedded_names_and_paths(tmp_path: Path):
    names = {"pydoc": False, "tiny:opt": False, "./x": False, str(tmp_path): False, "gpt2": True, "alice/x": True}
    assert {name: is_hub_id(name) for name in names} == names
