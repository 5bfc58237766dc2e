"""Notebooks that carry their code: what is packed is what the project needs, and runs without the repository."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import PROJECTS, REPOSITORY, refused
from launching import environment, error_line

from tools import kaggle


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kaggle")
    kaggle.write(REPOSITORY, folder, [], "somebody")
    return folder


def code_cells(path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def run_cell(code: str, folder) -> subprocess.CompletedProcess:
    """Run `code` in `folder` with nothing of the repository on the path."""
    return subprocess.run([sys.executable, "-I", "-"], input=code, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("project", PROJECTS)
def test_a_packed_notebook_is_small_and_kaggle_takes_its_folder(packed, project, kind):
    folder = packed / f"{project}-{kind}"
    metadata = json.loads((folder / "kernel-metadata.json").read_text())
    notebook = folder / metadata["code_file"]
    assert notebook.stat().st_size < 300_000
    assert metadata["id"] == f"somebody/{project}-{kind}" and metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["kernel_sources"] == ([f"somebody/{project}-train"] if kind == "eval" else [])
    nbformat.validate(nbformat.read(notebook, 4))
    first, second, *_ = cells = code_cells(notebook)
    assert first.metadata["_kg_hide-input"] and second.metadata["_kg_hide-input"] and "CODE = " in second.source
    assert nbformat.read(notebook, 4).cells[0].cell_type == "markdown"  # the title is seen first
    shown = [cell for cell in cells if cell.outputs]
    assert ["show_figure" in cell.source for cell in shown] == ([True] if kind == "train" else [])  # before any run
    if kind == "train":
        assert cells.index(shown[0]) == 2 and "image/svg+xml" in shown[0].outputs[0].data


@pytest.mark.parametrize("place", ["packed", "repository"])
@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("project", PROJECTS)
def test_kaggles_client_takes_the_folder(packed, project, kind, place):
    """The rules of `kernels_push` in kaggle 2.2.5 (kaggle/api/kaggle_api_extended.py), which accepted all of them."""
    folder = packed / f"{project}-{kind}" if place == "packed" else REPOSITORY / project / "notebooks" / kind
    metadata = json.loads((folder / "kernel-metadata.json").read_text())
    keys = {"id", "title", "code_file", "language", "kernel_type", "is_private", "enable_gpu", "enable_internet",
            "machine_shape", "dataset_sources", "competition_sources", "kernel_sources", "model_sources", "keywords",
            "docker_image_pinning_type"}  # fmt: skip
    assert metadata.keys() == keys and (folder / metadata["code_file"]).is_file()
    owner, slug = metadata["id"].split("/")
    assert len(metadata["title"]) >= 5 and re.sub(r"[^a-z0-9]+", "-", metadata["title"].lower()) == slug
    assert (metadata["language"], metadata["kernel_type"]) == ("python", "notebook")
    assert metadata["docker_image_pinning_type"] in ("original", "latest")
    assert all(source.split("/")[0] == owner and source.count("/") == 1 for source in metadata["kernel_sources"])
    for source in metadata["model_sources"]:
        assert re.fullmatch(r"[\w-]+/[\w.-]+/\w+/[\w.-]+/\d+", source)
    gated = "Llama-3.2-1B-Instruct" in (REPOSITORY / project / "config.yaml").read_text()
    assert gated == bool(metadata["model_sources"])  # a push cannot attach HF_TOKEN


@pytest.mark.parametrize("project", PROJECTS)
def test_what_is_packed_is_found_by_the_next_cell_and_runs_alone(packed, project, tmp_path):
    cells = code_cells(packed / f"{project}-train" / f"{project}-train.ipynb")
    script = "\n".join([cells[0].source, cells[1].source])
    done = run_cell(script, tmp_path)
    assert done.returncode == 0, done.stderr
    code = tmp_path / "multi-gpu-fine-tuning"
    assert "SHA-256" in done.stdout and f"The code is in {code}" in done.stdout
    assert os.access(code / project / "launch.sh", os.X_OK) and not (code / ".git").exists()
    variables = environment(cold=True, PYTHONPATH=f"{code / project}:{code}")
    command = [sys.executable, "train.py", "--config", "smoke.yaml", "train.lerning_rate=1"]
    refused_run = subprocess.run(command, cwd=code / project, env=variables, capture_output=True, text=True)
    assert "did you mean train.learning_rate" in error_line(refused_run.stderr)
    show = f"from tools import results; print(len(results.tables({project!r}, results.REPOSITORY / 'results')))"
    shown = subprocess.run([sys.executable, "-c", show], cwd=code, env=variables, capture_output=True, text=True)
    assert int(shown.stdout) > 0, shown.stderr


def test_the_same_files_are_packed_alike_and_damage_is_noticed(packed, tmp_path):
    assert kaggle.pack(REPOSITORY, "pytorch-ddp") == kaggle.pack(REPOSITORY, "pytorch-ddp")
    code = code_cells(packed / "pytorch-ddp-train/pytorch-ddp-train.ipynb")[0].source
    at = code.index('PACKED = """') + 2000
    damaged = code[:at] + ("A" if code[at] != "A" else "B") + code[at + 1 :]
    done = run_cell(damaged, tmp_path)
    assert done.returncode and "import the notebook again" in done.stderr and not [*tmp_path.iterdir()]


def test_without_any_code_one_line_says_the_three_ways_out(packed, tmp_path):
    cell = code_cells(packed / "pytorch-ddp-train/pytorch-ddp-train.ipynb")[1].source
    cell = cell.replace('CODE = "https://', 'CODE = "/nowhere/')
    done = run_cell(cell, tmp_path)
    assert done.returncode and not [*tmp_path.iterdir()]
    line = done.stderr.splitlines()[-1]
    assert "make kaggle" in line and "attach a dataset" in line and "set CODE" in line


def test_an_unknown_project_is_refused(tmp_path):
    with refused("pytorch-dpd", "pytorch-ddp"):
        kaggle.write(REPOSITORY, tmp_path, ["pytorch-dpd"], "somebody")


def test_a_clone_and_python_are_all_that_is_needed(tmp_path):
    """As `make kaggle` calls it, without any installed package."""
    command = [sys.executable, "-S", "-m", "tools.kaggle", "ray-tune", "--user", "somebody", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind in ("train", "eval"):
        read = nbformat.read(tmp_path / f"ray-tune-{kind}/ray-tune-{kind}.ipynb", 4)
        nbformat.validate(read)
        assert json.loads((tmp_path / f"ray-tune-{kind}/kernel-metadata.json").read_text())["id"].startswith(
            "somebody/"
        )
