"""One line for a mistake that all ranks meet, whichever of them meets it first."""

import subprocess

import pytest
from launching import PYTHON, environment, error_line

SCRIPT = """
import os, sys, time
from common import errors, runtime
from common.config import RuntimeConfig
from common.errors import UserError

def main():
    stop = runtime.StopRequest(RuntimeConfig())  # from here on, the launcher's SIGTERM is only noted
    lags = [float(lag) for lag in sys.argv[1:]]
    time.sleep(lags[int(os.environ["RANK"])])
    raise UserError("data.text_column=body is not a column")

errors.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lags", [("0", "0"), ("0", "2"), ("2", "0")], ids=["together", "rank-0-first", "rank-1-first"])
def test_two_ranks_say_it_once(tmp_path, lags):
    script = tmp_path / "mistaken.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [PYTHON, "-m", "launchers.torchrun", "--standalone", "--nproc_per_node", "2", str(script), *lags],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert error_line(done.stdout) == "error: data.text_column=body is not a column"
