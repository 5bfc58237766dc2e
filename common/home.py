"""A user and a home folder that libraries can rely on: containers often lack a passwd entry or a writable home.

Standard library only: it runs before any library looks for its caches. What the environment sets stays as it is.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

# What libraries write below the home folder: variable → subfolder of a temporary one that takes its place.
CACHES = {
    "MPLCONFIGDIR": "matplotlib",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",  # DeepSpeed's compiled operators
    "TRITON_HOME": "triton",
    "WANDB_CACHE_DIR": "wandb",
    "WANDB_CONFIG_DIR": "wandb",
    "WANDB_DATA_DIR": "wandb",
}


def provide_user_and_home() -> None:
    """Name the user if nothing does, and give libraries another place for their caches if the home is not writable.

    A home that can only be read keeps its credentials and its Hugging Face cache.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # no passwd entry: torch.compile, W&B and MLflow ask for the name
        os.environ["LOGNAME"] = os.environ["USER"] = f"uid-{os.getuid()}"
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if home and _is_writable(home):
        return
    substitute = Path(tempfile.gettempdir()) / f"home-{os.getuid()}"
    try:
        substitute.mkdir(mode=0o700, exist_ok=True)
        if substitute.stat().st_uid != os.geteuid():  # somebody else made it
            substitute = Path(tempfile.mkdtemp(prefix="home-"))
    except OSError:  # nothing is writable: each library copes as it can
        return
    if home is None or not home.is_dir():
        os.environ["HOME"] = str(substitute)
        return
    for variable, folder in CACHES.items():
        os.environ.setdefault(variable, str(substitute / folder))
    if "XDG_CACHE_HOME" not in os.environ:
        huggingface = home / ".cache" / "huggingface"
        if huggingface.is_dir():
            os.environ.setdefault("HF_HOME", str(huggingface))
        os.environ["XDG_CACHE_HOME"] = str(substitute / "cache")


def _is_writable(folder: Path) -> bool:
    """Tried, not asked: a read-only file system and root's rights are both seen only this way."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
