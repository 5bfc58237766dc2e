"""Notebooks that carry their code, for Kaggle's *File → Import Notebook* and for `kaggle kernels push`.

    python -m tools.kaggle [PROJECT ...] [--user NAME] [--folder build/kaggle]          # or: make kaggle

Each notebook of the projects gets a folder with an `.ipynb` and `kernel-metadata.json`. The notebook needs no copy of
the repository: its first, collapsed cell holds the project, `common/`, `launchers/`, `tools/` and the records of its
tables, compressed, and unpacks them on Kaggle's scratch disk, where the next cell finds them. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import lzma
import subprocess
import tarfile
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from common import errors
from common.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent  # not common.config's, which imports more than the standard library
SHARED = ("common", "launchers", "tools", "pyproject.toml", "LICENSE")
KEPT = {".py", ".sh", ".yaml", ".json", ".toml", ".txt", ".svg", ".md", ""}  # endings; no notebooks, no pictures
UNPACK = '''\
# The code of {project}, revision {revision}, packed: unpacked here, and found by the next cell.
import base64
import hashlib
import io
import tarfile
from pathlib import Path

PACKED = """
{packed}
"""
content = base64.b85decode(PACKED.replace("\\n", ""))
digest = hashlib.sha256(content).hexdigest()
if digest != "{digest}":
    raise SystemExit("the packed code is damaged: import the notebook again")
code = Path("/kaggle/temp" if Path("/kaggle").is_dir() else ".", "multi-gpu-fine-tuning")
with tarfile.open(fileobj=io.BytesIO(content)) as archive:
    archive.extractall(code, filter="data")
print(f"revision {revision}, SHA-256 {{digest[:12]}}: {{sum(path.is_file() for path in code.rglob('*'))}} files")
'''
# Kaggle's own copies of models that are gated on the Hub: a push cannot attach the secret HF_TOKEN.
LLAMA = "metaresearch/llama-3.2/transformers/1b-instruct/1"
MODELS = {"deepspeed-offload": [LLAMA], "deepspeed-pipeline": [LLAMA]}
WIDTH = 160  # characters in a line of the packed code


def origin(repository: Path) -> tuple[str, str]:
    """The repository's address and the Kaggle account, from pyproject.toml: the only place where they are set."""
    settings = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    address = settings["project"]["urls"]["Repository"]
    owner = urlsplit(address).path.strip("/").partition("/")[0]
    return address, settings["tool"].get("notebooks", {}).get("kaggle", owner)


def kernel_metadata(project: str, kind: str, owner: str, notebook: str) -> str:
    """What `kaggle kernels push` sends: two T4, internet on; the evaluation gets the training's output as input."""
    title = f"{project} {kind}"
    return (
        json.dumps(
            {
                "id": f"{owner}/{title.replace(' ', '-')}",
                "title": title,
                "code_file": notebook,  # seen from the folder of the metadata
                "language": "python",
                "kernel_type": "notebook",
                "is_private": True,
                "enable_gpu": True,
                "enable_internet": True,
                "machine_shape": "NvidiaTeslaT4",
                "dataset_sources": [],
                "competition_sources": [],
                "kernel_sources": [f"{owner}/{project}-train"] if kind == "eval" else [],
                "model_sources": MODELS.get(project, []),
                "keywords": ["gpu", "nlp", "pytorch"],
                "docker_image_pinning_type": "latest",  # what it lacks is installed, and its torch is kept
            },
            indent=1,
        )
        + "\n"
    )


def files(repository: Path, project: str) -> list[Path]:
    """What a notebook of the project needs, relative to the repository, in a fixed order."""
    found = []
    for name in (project, *SHARED, f"results/{project}"):
        place = repository / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(repository).parts)
            if path.is_file() and not hidden and path.suffix in KEPT:
                found.append(path.relative_to(repository))
    return found


def pack(repository: Path, project: str) -> bytes:
    """The files as a `.tar.xz` that is the same for the same files: no times, no owners."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in files(repository, project):
            member = tarfile.TarInfo(str(path))
            content = (repository / path).read_bytes()
            member.size, member.mode = len(content), 0o755 if path.suffix == ".sh" else 0o644
            archive.addfile(member, io.BytesIO(content))
    return lzma.compress(tar.getvalue(), preset=9)


def revision(repository: Path) -> str:
    """The commit, with a plus sign if files differ from it; `unknown` without git."""
    git = ["git", "-C", str(repository)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def packed_notebook(repository: Path, project: str, kind: str, content: bytes, commit: str) -> str:
    """The notebook `kind` of the project with a cell that unpacks `content`, and no outputs but the picture."""
    notebook = json.loads((repository / project / f"notebooks/{kind}.ipynb").read_text(encoding="utf-8"))
    text = base64.b85encode(content).decode()
    lines = "\n".join(text[i : i + WIDTH] for i in range(0, len(text), WIDTH))
    digest = hashlib.sha256(content).hexdigest()
    code = UNPACK.format(project=project, revision=commit, packed=lines, digest=digest)
    hidden = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}}
    cell = {"cell_type": "code", "execution_count": None, "id": "packed", "metadata": hidden, "outputs": []}
    for each in notebook["cells"]:
        if each["cell_type"] == "code":
            each["outputs"] = each["outputs"] if "notebook.show_figure(" in "".join(each["source"]) else []
            each["execution_count"] = None
    codes = [i for i, each in enumerate(notebook["cells"]) if each["cell_type"] == "code"]
    notebook["cells"].insert(codes[0], cell | {"source": code.splitlines(keepends=True)})  # the title comes first
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def write(repository: Path, folder: Path, projects: list[str], user: str) -> list[Path]:
    """Write a folder for each notebook of `projects`; returns them. Raises `UserError` for an unknown project."""
    known = sorted(path.parent.parent.name for path in repository.glob("*/notebooks/train.ipynb"))
    if unknown := [project for project in projects if project not in known]:
        raise UserError(f"{unknown[0]} is not a project: choose from {', '.join(known)}")
    written, commit = [], revision(repository)
    for project in projects or known:
        content = pack(repository, project)
        for kind in ("train", "eval"):
            place = folder / f"{project}-{kind}"
            place.mkdir(parents=True, exist_ok=True)
            name = f"{project}-{kind}.ipynb"
            (place / name).write_text(packed_notebook(repository, project, kind, content, commit), encoding="utf-8")
            metadata = kernel_metadata(project, kind, user, name)
            (place / "kernel-metadata.json").write_text(metadata, encoding="utf-8")
            written.append(place)
    return written


def main() -> None:
    """Write the folders and name the notebooks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projects", nargs="*", metavar="PROJECT", help="default: all seven")
    owner = origin(REPOSITORY)[1]
    parser.add_argument("--user", default=owner, help=f"Kaggle account (default: {owner}, the repository's owner)")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build/kaggle")
    arguments = parser.parse_args()
    for place in write(REPOSITORY, arguments.folder, arguments.projects, arguments.user):
        (notebook,) = place.glob("*.ipynb")
        print(f"{notebook}  {notebook.stat().st_size / 1000:.0f} KB")
    print("\nKaggle: File → Import Notebook, choose one of these, accelerator GPU T4 x2, Run All")


if __name__ == "__main__":
    errors.run(main)
