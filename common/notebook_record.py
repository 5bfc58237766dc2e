"""Execute a notebook and keep what it shows.

    python -m common.notebook_record pytorch-ddp/notebooks/train.py train.max_steps=200
    python -m common.notebook_record pytorch-ddp/notebooks/eval.py

The outputs are written into the `.ipynb`, whose code stays as it is; if a cell fails, nothing is written. The settings,
any keys of the project's configuration, take the place of the parameter SETTINGS, and are shown below it. Needed are
the extra `notebooks` of pyproject.toml and what the project needs; no network, if nothing has to be installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from common import errors, notebook_files
from common.config import REPOSITORY
from common.errors import UserError


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


def record(source: Path, settings: list[str]) -> None:
    """Execute the notebook of `source` and write its `.ipynb`. Raises `UserError` if there is none, or a cell fails."""
    if not notebook_files.is_source(source):
        raise UserError(f"{source} is no source of a notebook: name one, such as pytorch-ddp/notebooks/train.py")
    text = source.read_text(encoding="utf-8")
    found = nbformat.reads(notebook_files.notebook(text, None), 4)
    edits = [f"SETTINGS = {settings!r}", "print('recorded with', *SETTINGS, sep='\\n  ')"] if settings else []
    try:
        execute(found, edits, source.parent)
    except CellExecutionError as error:
        print(error)
        raise UserError(f"{source} was not recorded: {error.ename}: {error.evalue}") from None
    executed = nbformat.writes(found).replace(f"{REPOSITORY}/", "")  # paths as seen from the repository
    source.with_suffix(".ipynb").write_text(notebook_files.notebook(text, executed), encoding="utf-8")


if __name__ == "__main__":
    errors.run(lambda: record(Path(*sys.argv[1:2]).resolve(), sys.argv[2:]))
