"""Write the notebooks of all projects from their sources: `python -m tools.notebook_files [--check] [REVISION]`.

A source is `PROJECT/notebooks/train.py` or `eval.py`, in jupytext's percent format. From it come the `.ipynb` next to
it, in which cells keep their outputs as long as their code stays, and the folder that `kaggle kernels push -p` takes.
The tables of what was measured are always those of `results/`.
The repository's address stands in pyproject.toml, under `project.urls`, and is copied from there into the notebooks and
CITATION.cff. The Kaggle account is the address's owner, unless `tool.notebooks.kaggle` names another. With a REVISION,
a commit or a tag, the notebooks fetch that one from now on; the outputs stay. `--check` changes nothing and fails if a
file is out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jupytext
import nbformat

from common import errors
from common.config import REPOSITORY
from common.errors import UserError
from tools.kaggle import kernel_metadata, origin
from tools.results import code_block, tables

RECORDED = "recorded"  # in a notebook's metadata: what the run was whose outputs it shows
MEASURED = re.compile(r'^notebook\.show_measured\("(.*)"\)$')
SHOWN_CODE = re.compile(r"^notebook\.show_code\((.*)\)$", re.DOTALL)
CITED = re.compile(r'^repository-code: ".*"$', re.MULTILINE)
ADDRESS, PIN = re.compile(r'^CODE = "(.*)"$', re.MULTILINE), re.compile(r'^REVISION = ".*"$', re.MULTILINE)


def is_source(path: Path) -> bool:
    """Whether the file is there and is such a source: a notebook in the percent format, one cell has the parameters."""
    if path.suffix != ".py" or not path.is_file():
        return False
    read = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    tags = [tag for cell in read.cells for tag in cell.metadata.get("tags", [])]
    return "kernelspec" in read.metadata and tags == ["parameters"]


def source(text: str, address: str, revision: str) -> str:
    """The source with the repository's address, everywhere, and the revision, if there is one."""
    if old := ADDRESS.search(text):
        text = text.replace(old[1], address)
    return PIN.sub(f'REVISION = "{revision}"', text) if revision else text


def notebook(text: str, old: str | None) -> str:
    """The `.ipynb` of a source, with the outputs that cells of the `old` one have where their code is the same.

    Under its title stands what run they come from, if it was recorded.
    """
    made = jupytext.reads(text, fmt="py:percent")
    outputs = {}
    earlier = nbformat.reads(old, 4) if old else made
    for cell in earlier.cells if old else []:
        if cell.cell_type == "code":
            outputs[_without_origin(cell.source)] = cell
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # not a random one: equal sources make equal files
        if cell.cell_type == "code" and (known := outputs.get(_without_origin(cell.source))):
            cell.outputs, cell.execution_count = known.outputs, known.execution_count
            if cell.outputs and (found := _from_files(cell.source)):
                cell.outputs = [
                    nbformat.v4.new_output("display_data", {"text/markdown": text, "text/plain": "a table or code"})
                    for text in found
                ]
    made.metadata = {"kernelspec": made.metadata["kernelspec"], "language_info": {"name": "python"}}
    if recorded := earlier.metadata.get(RECORDED):
        made.metadata[RECORDED] = recorded
        title, _, rest = made.cells[0].source.partition("\n")
        made.cells[0].source = f"{title}\n\n{recorded}\n{rest}"
    return nbformat.writes(made, version=4) + "\n"


def _from_files(code: str) -> list[str]:
    """What the cell shows of results/ and of the code, in Markdown: always as the files are now."""
    if measured := MEASURED.match(code):
        return tables(measured[1], REPOSITORY / "results")
    if shown := SHOWN_CODE.match(code):
        return [code_block(place, REPOSITORY) for place in re.findall('"(.*?)"', shown[1])]
    return []


def _without_origin(code: str) -> str:
    """A cell's code, wherever the repository is fetched from: that changes no output."""
    return PIN.sub("", ADDRESS.sub("", code))


def update(repository: Path, check: bool, revision: str = "") -> None:
    """Write what changed; with `check`, raise `UserError` if something would change."""
    address, account = origin(repository)
    files = []
    if (citation := repository / "CITATION.cff").exists():
        files.append((citation, CITED.sub(f'repository-code: "{address}"', citation.read_text(encoding="utf-8"))))
    for path in sorted(repository.glob("*/notebooks/*.py")):
        project, kind = path.parent.parent.name, path.stem
        ipynb, metadata = path.with_suffix(".ipynb"), path.parent / kind / "kernel-metadata.json"
        text = source(path.read_text(encoding="utf-8"), address, revision)
        old = ipynb.read_text(encoding="utf-8") if ipynb.exists() else None
        files += [
            (path, text),
            (ipynb, notebook(text, old)),
            (metadata, kernel_metadata(project, kind, account, f"../{kind}.ipynb")),
        ]
    stale = [(file, new) for file, new in files if not file.exists() or file.read_text(encoding="utf-8") != new]
    if stale and check:
        names = ", ".join(str(file.relative_to(repository)) for file, _ in stale)
        raise UserError(f"out of date: {names}; bring them up to date with: make notebooks")
    for file, new in stale:
        file.parent.mkdir(exist_ok=True)
        file.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    errors.run(lambda: update(REPOSITORY, "--check" in sys.argv, *arguments))
