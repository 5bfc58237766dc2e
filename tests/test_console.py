"""What a process prints never ends it, and holds no password."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import environment

from common.console import output_to
from common.redaction import encoded, without_secrets

# Prints as a training does, on both streams and past any buffer, and notes in a file that it came to its end.
SCRIPT = """
import sys
from pathlib import Path
from common import errors

def main():
    for step in range(2000):
        print(f"held-out loss 3.5000 → 2.1000 – {step} × ↓ … \\udcff")
        print(f"warning: ’{step}’", file=sys.stderr)
    sys.stdout.flush()
    Path(sys.argv[1]).write_text(f"{sys.stdout.encoding}")

errors.run(main)
"""


def command(tmp_path: Path) -> list[str]:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    return [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "done")]


def assert_came_to_its_end(tmp_path: Path, exit_code: int) -> None:
    assert (tmp_path / "done").exists()
    assert exit_code == 0


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("ascii", "held-out loss 3.5000 -> 2.1000 - 7 x v ... ?"),
        ("latin-1", "held-out loss 3.5000 -> 2.1000 - 7 × v ... ?"),
        ("cp1252", "held-out loss 3.5000 -> 2.1000 – 7 × v … ?"),
        ("utf-8", "held-out loss 3.5000 → 2.1000 – 7 × ↓ … ?"),
        ("shift_jis", "held-out loss 3.5000 → 2.1000 - 7 × ↓ … ?"),
    ],
)
def test_any_encoding(tmp_path, encoding, line):
    done = subprocess.run(command(tmp_path), env=environment(cold=True, PYTHONIOENCODING=encoding), capture_output=True)
    assert done.stdout.decode(encoding).splitlines()[7] == line
    assert len(done.stdout.decode(encoding).splitlines()) == 2000
    assert len(done.stderr.decode(encoding).splitlines()) == 2000
    assert_came_to_its_end(tmp_path, done.returncode)


def test_the_posix_locale_without_utf_8_mode(tmp_path):
    variables = environment(cold=True, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = subprocess.run(command(tmp_path), env=variables, capture_output=True)
    assert b"3.5000 -> 2.1000" in done.stdout
    assert_came_to_its_end(tmp_path, done.returncode)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_whose_reader_leaves(tmp_path, unbuffered):
    process = subprocess.Popen(
        command(tmp_path),
        env=environment(cold=True, PYTHONUNBUFFERED=unbuffered),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert b"held-out loss" in process.stdout.readline()  # as `| head -1` does
    process.stdout.close()
    assert_came_to_its_end(tmp_path, process.wait(60))


def test_a_terminal_that_is_gone(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(tmp_path), env=environment(cold=True), stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 10)
    os.close(ours)  # from now on, every write to it is an input/output error
    assert_came_to_its_end(tmp_path, process.wait(60))


@pytest.mark.parametrize("redirection", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&-", "2>&-", ">&- 2>&-"])
def test_a_full_disk_or_no_stream_at_all(tmp_path, redirection):
    line = " ".join(command(tmp_path))
    done = subprocess.run(["bash", "-c", f"{line} {redirection}"], env=environment(cold=True), capture_output=True)
    assert_came_to_its_end(tmp_path, done.returncode)
    kept = (done.stdout, "held-out") if redirection.startswith("2") else (done.stderr, "warning")
    if ">&1" not in redirection and redirection != ">&- 2>&-":
        assert kept[0].decode().count(kept[1]) == 2000  # the other stream is whole


def test_a_non_blocking_pipe_that_is_read_slowly(tmp_path):
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    process = subprocess.Popen(command(tmp_path), env=environment(cold=True), stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    time.sleep(1)
    read = b""
    while chunk := os.read(ours, 4096):
        read += chunk
    os.close(ours)
    assert read.decode().count("held-out") == 2000
    assert_came_to_its_end(tmp_path, process.wait(60))


def test_output_goes_to_files_that_may_be_full(tmp_path):
    with output_to(tmp_path / "out", tmp_path / "errors", terminal=True):
        print("3 → 2")
        print("warning: 1", file=sys.stderr)
        assert sys.stdout.isatty()
    with output_to(tmp_path / "out"):
        print("more")
        print("and errors", file=sys.stderr)
        assert not sys.stdout.isatty()
    assert (tmp_path / "out").read_text(encoding="utf-8") == "3 → 2\nmore\nand errors\n"
    assert (tmp_path / "errors").read_text() == "warning: 1\n"
    with output_to(Path("/dev/full")):
        print("lost")


# --- secrets

PASSWORDS = ["s3cret-word", "p@ss", "a/b/c", "p#q?r=1&s", "with space", "ünïcode→", "a:b:c", "100%", "back\\slash",
             "q'uo\"te", "[br]ack", "x@y/z@", "//", "p%40ss"]  # fmt: skip


@pytest.mark.parametrize("password", PASSWORDS)
def test_nothing_of_a_password_survives(monkeypatch, password):
    from urllib.parse import quote, unquote

    from sqlalchemy.engine import make_url

    address = f"postgresql://alice:{password}@db.example.org:5432/runs"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    plain = unquote(password)
    for form in {password, plain, quote(plain, safe=""), quote(plain)}:
        shown = without_secrets(f"Could not parse 'postgresql://alice:{form}@db.example.org:5432/runs'")
        assert shown == "Could not parse 'postgresql://db.example.org:5432/runs'"
        assert form not in without_secrets(f"no user alice:{form} there") and "alice" in without_secrets("alice")
    # A library gets an address in which it finds the same parts, whatever the password consists of.
    url = make_url(encoded(address))
    assert (url.host, url.port, url.database, url.username, url.password) == (
        "db.example.org", 5432, "runs", "alice", plain,
    )  # fmt: skip


@pytest.mark.parametrize("password", [p for p in PASSWORDS if " " not in p])
def test_an_address_that_the_environment_does_not_hold(password):
    shown = without_secrets(f"data.name=https://bob:{password}@files.example.org/a.jsonl: no such file")
    assert shown == "data.name=https://files.example.org/a.jsonl: no such file"


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/owner/name/tree/v1.0@main",
        "http://127.0.0.1:5000/#/experiments/1/runs/2",
        "mlflow ui --backend-store-uri sqlite:////home/alice/my run/mlflow.db",
        "write to alice@example.org",
        "12:30 at ratio 1:2",
    ],
)
def test_other_text_stays(text):
    assert without_secrets(text) == encoded(text) == text


def test_an_error_line_has_no_password(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom common import errors\n"
        "def main():\n    raise errors.UserError('cannot reach ' + os.environ['HTTPS_PROXY'])\n"
        "errors.run(main)\n"
    )
    variables = environment(cold=True, HTTPS_PROXY="http://alice:pa ss/w@rd@proxy:3128")
    done = subprocess.run([sys.executable, str(script)], env=variables, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("error: cannot reach http://proxy:3128\n")
