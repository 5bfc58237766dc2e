"""Execute a notebook and keep what it shows.

    python -m tools.notebook_record pytorch-ddp/notebooks/train.py train.max_steps=200
    python -m tools.notebook_record pytorch-ddp/notebooks/eval.py --config smoke.yaml

The outputs are written into the `.ipynb`, whose code stays as it is; if a cell fails, nothing is written. The arguments
are those of the project's scripts: they take the place of the parameters CONFIG and SETTINGS, and are shown below them.
Needed are the extra `notebooks` of pyproject.toml and what the project needs; no network, if nothing has to be
installed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from common import errors
from common.config import REPOSITORY
from common.errors import UserError
from tools import notebook_files

SHOWN = "The outputs of this notebook were recorded with: --config"


def execute(found: nbformat.NotebookNode, edits: list[str], folder: Path, **options) -> None:
    """Run all cells in `folder`, with the lines `edits` below the parameters, and leave the outputs in `found`.

    `options` go to nbclient's `execute`. Raises its `CellExecutionError` if a cell fails.
    """
    (parameters,) = (cell for cell in found.cells if "parameters" in cell.metadata.get("tags", []))
    written = parameters.source
    parameters.source = "\n".join([written, *edits])
    client = NotebookClient(
        found,
        timeout=None,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # a kernel warns that its sockets, on this machine, are not encrypted
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        on_cell_executed=_print_text,
    )
    try:
        client.execute(**options)
    finally:
        parameters.source = written


def _print_text(cell: nbformat.NotebookNode, cell_index: int, execute_reply: dict) -> None:
    print(*(output.text for output in cell.outputs if output.output_type == "stream"), sep="", end="", flush=True)


def record(source: Path, config: str, settings: list[str], remark: str = "") -> None:
    """Execute the notebook of `source` and write its `.ipynb`; `remark` joins what its outputs say of the run.

    Raises `UserError` if there is none, or a cell fails.
    """
    if not notebook_files.is_source(source):
        raise UserError(f"{source} is not the source of a notebook: name one, such as pytorch-ddp/notebooks/train.py")
    text = source.read_text(encoding="utf-8")
    found = nbformat.reads(notebook_files.notebook(text, None), 4)
    edits = [f"CONFIG, SETTINGS = {config!r}, {settings!r}", f"print({SHOWN!r}, CONFIG, *SETTINGS)"]
    found.cells.append(nbformat.v4.new_code_cell("print(notebook.describe_run(RUN))"))
    try:
        execute(found, edits, source.parent)
    except CellExecutionError as error:
        print(error)
        raise UserError(f"{source} was not recorded: {error.ename}: {error.evalue}") from None
    described = found.cells.pop().outputs[0].text.strip()
    found.metadata[notebook_files.RECORDED] = re.sub(r"\.\*$", f"; {remark}.*", described) if remark else described
    executed = nbformat.writes(found).replace(f"{REPOSITORY}/", "")  # paths as seen from the repository
    source.with_suffix(".ipynb").write_text(notebook_files.notebook(text, executed), encoding="utf-8")


def main() -> None:
    """Execute the notebook that the command line names and keep its outputs."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.notebook_record", usage="%(prog)s SOURCE [--config FILE] [key=value ...]"
    )
    parser.add_argument("source", nargs="?", default="", help="PROJECT/notebooks/train.py or eval.py")
    parser.add_argument("--config", default="config.yaml", help="YAML file: a path, or a name next to the script")
    parser.add_argument("--remark", default="", help="what a reader of the outputs must know, such as of other runs")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that win over the file")
    arguments = parser.parse_intermixed_args()
    record(Path(arguments.source).resolve(), arguments.config, arguments.settings, arguments.remark)


if __name__ == "__main__":
    errors.run(main)
