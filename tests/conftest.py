"""What several test files share."""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import warm_python

from common.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
FAMILIES = ("qwen2", "llama", "opt", "bloom")


def pytest_configure(config):
    """Make the folder that all processes of this test session share, with the stand-ins for Python (warm_python.py)."""
    if not hasattr(config, "workerinput"):  # not in a worker of pytest-xdist
        session = Path(tempfile.mkdtemp(prefix="tests-", dir="/tmp"))  # a socket's path must be short
        os.environ["TEST_SESSION"] = str(session)
        warm_python.make_bin(session / "warm/main", Path(sys.executable))
        warm_python.make_bin(session / "warm/foundry", REPOSITORY / ".venv-foundry/bin/python")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("TEST_SESSION"), ignore_errors=True)


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
    """What the Hub on this machine serves: a model and a data set under each real name."""
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
def untied(tmp_path_factory) -> str:
    """A model folder with an output head of its own: its weights are read from a file."""
    import torch
    from transformers import AutoModelForCausalLM

    from common import models
    from common.config import ModelConfig

    folder = tmp_path_factory.mktemp("untied")
    shape = models.load_model_config(ModelConfig("tiny:llama"))
    shape.tie_word_embeddings = False
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    models.load_tokenizer(ModelConfig("tiny:llama")).save_pretrained(folder)
    return str(folder)
