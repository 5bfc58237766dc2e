"""What several test files share."""

import contextlib
import gc
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import warm_python

from common.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECTS = sorted(path.parent.name for path in REPOSITORY.glob("*/launch.sh"))
PATIENCE = 15  # seconds
FAMILIES = ("qwen2", "llama", "opt", "bloom")


# Until the tests are collected: a quarter of the seconds that imports take are collections that find no garbage.
gc.disable()


def pytest_configure(config):
    """Make the folder that all processes of this test session share, with the stand-ins for Python (warm_python.py)."""
    if not hasattr(config, "workerinput"):  # not in a worker of pytest-xdist
        session = Path(tempfile.mkdtemp(prefix="tests-", dir="/tmp"))  # a socket's path must be short
        os.environ["TEST_SESSION"] = str(session)
        # As for the processes that tests start: threads of three workers on two cores wait for one another.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        warm_python.make_bin(session / "warm/main", Path(sys.executable))
        warm_python.make_bin(session / "warm/foundry", REPOSITORY / ".venv-foundry/bin/python")


# Seconds on two cores (pytest --durations=0). The longest files come first, so that no worker is left with one at the
# end; LLM Foundry's later, since its environment may still be being built.
LONGEST_FIRST = ("test_ray_train", "test_notebooks", "test_pipeline", "test_tune", "test_fsdp", "test_offload",
                 "test_foundry", "test_ddp", "test_packing", "test_ddp_hub", "test_launchers")  # fmt: skip


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish():
    gc.freeze()  # what was imported stays
    gc.enable()


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("TEST_SESSION"), ignore_errors=True)


def _started_here() -> dict[int, psutil.Process]:
    """The running processes of this test session: launchers, ranks, Ray; without pytest's own and zygotes' forks."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.environ().get("TEST_SESSION") == os.environ["TEST_SESSION"]
            in_worker = process.environ().get("PYTEST_XDIST_WORKER") == os.environ.get("PYTEST_XDIST_WORKER")
            ended = process.status() == psutil.STATUS_ZOMBIE
            if is_ours and in_worker and not ended and process.pid not in own and not _forked(process):
                found[process.pid] = process
    return found


def _forked(process: psutil.Process) -> bool:
    """A zygote, or a process forked from one: that ends with its client, which is found. Ray renames its workers."""
    words = process.cmdline()
    renamed = words[:1] and words[0].startswith("ray::") and process.parent()
    return "--zygote" in (renamed.cmdline() if renamed else words)


@pytest.fixture(autouse=True)
def no_process_is_left(request):
    """A test that starts processes fails if one of them is running PATIENCE seconds after its end."""
    if not request.node.get_closest_marker("slow"):
        yield
        return
    before = _started_here()  # a cluster that the tests of a module share, say, with what it will start
    yield
    deadline = time.monotonic() + PATIENCE
    while True:
        left = [p for pid, p in _started_here().items() if pid not in before and not _below(p, before)]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    names = [f"{process.pid}: {' '.join(process.cmdline())}" for process in left]
    for process in left:
        process.kill()
    assert not left, names


def _below(process: psutil.Process, others: dict[int, psutil.Process]) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(parent.pid in others for parent in process.parents())
    return True  # it has ended


@contextlib.contextmanager
def refused(*parts: str):
    """The block must raise a `UserError`: one line, with each of `parts` (key, file, remedy) in it."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message, message
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


@pytest.fixture(scope="session")
def hub_root(tmp_path_factory) -> Path:
    """What the Hub on this machine serves: a model and a dataset under each real name."""
    from hub_content import fill
    from hub_server import HubServer

    root = tmp_path_factory.mktemp("hub")
    fill(HubServer(root), root / "made")
    return root


@pytest.fixture
def hub(hub_root):
    """The running Hub, with its accounts and its gated model."""
    from hub_content import GATED, TOKENS
    from hub_server import HubServer

    with HubServer(hub_root, tokens=TOKENS, gated=GATED) as server:
        yield server


@pytest.fixture(scope="session")
def untied() -> str:
    """A model folder with an output head of its own: its weights are read from a file."""
    from launching import made_once

    def make(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from common import models
        from common.config import ModelConfig

        shape = models.load_model_config(ModelConfig("tiny:llama"))
        shape.tie_word_embeddings = False
        with torch.random.fork_rng():
            torch.manual_seed(3)
            AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
        models.load_tokenizer(ModelConfig("tiny:llama")).save_pretrained(folder)

    return str(made_once("untied", make))
