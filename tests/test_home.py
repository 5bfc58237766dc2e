"""Users without a passwd entry, and homes that cannot be written: `common` names the user and places the caches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment

# What a library sees after `import common`, in a container whose user 54321 nobody has entered anywhere.
SCRIPT = """
import os
os.getuid = lambda: 54321
import getpass, json, common
print(json.dumps({"user": getpass.getuser(), "home": os.path.expanduser("~"),
                  **{name: os.environ.get(name) for name in ("MPLCONFIGDIR", "HF_HOME", "XDG_CACHE_HOME",
                                                             "WANDB_CACHE_DIR")}}))
"""
NAMES = ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TMPDIR")
UNSET = dict.fromkeys(("MPLCONFIGDIR", "HF_HOME", "XDG_CACHE_HOME", "WANDB_CACHE_DIR"))


def seen(*prefix: str, **variables: str) -> dict:
    kept = {k: v for k, v in environment(cold=True).items() if k not in NAMES}
    command = [*prefix, sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=kept | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_user_without_a_passwd_entry_has_a_name_and_a_home(tmp_path: Path):
    assert seen(TMPDIR=str(tmp_path)) == {"user": "uid-54321", "home": str(tmp_path / "home-54321"), **UNSET}
    assert (tmp_path / "home-54321").stat().st_mode & 0o777 == 0o700


def test_a_home_that_does_not_exist_is_replaced(tmp_path: Path):
    found = seen(HOME="/nonexistent", USER="alice", TMPDIR=str(tmp_path))
    assert found == {"user": "alice", "home": str(tmp_path / "home-54321"), **UNSET}


def test_a_home_of_ones_own_is_left_alone(tmp_path: Path):
    assert seen(HOME=str(tmp_path), LOGNAME="alice") == {"user": "alice", "home": str(tmp_path), **UNSET}
    assert not list(tmp_path.iterdir())


def test_a_read_only_home_stays_and_caches_go_elsewhere(tmp_path: Path):
    home, other = tmp_path / "home", tmp_path / "home-54321"
    (home / ".cache/huggingface").mkdir(parents=True)
    inside = f'mount --bind "{home}" "{home}" && mount -o remount,bind,ro "{home}" && exec "$@"'
    mounted = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []), "bash", "-c", inside, ""]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us make a folder read-only for root")
    found = seen(*mounted, HOME=str(home), TMPDIR=str(tmp_path), MPLCONFIGDIR="/elsewhere")
    assert found == {
        "user": "uid-54321",
        "home": str(home),  # where credentials are
        "HF_HOME": str(home / ".cache/huggingface"),  # what was downloaded
        "MPLCONFIGDIR": "/elsewhere",  # as it was set
        "XDG_CACHE_HOME": str(other / "cache"),
        "WANDB_CACHE_DIR": str(other / "wandb"),
    }
