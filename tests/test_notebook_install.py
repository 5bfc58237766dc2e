"""The notebooks' install cell, in an environment that has another torch than this one: LLM Foundry's."""

import importlib.metadata
import json
import subprocess
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY
from launching import environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

INSTALL = "from tools import notebook; notebook.install({!r})"
SEEN = "import json, {0}; print(json.dumps([torch.__version__, torch.__file__, *(m.__name__ for m in ({0}))]))"


def wheel(folder: Path, name: str, version: str, needs: list[str] = ()) -> None:
    """An empty package."""
    info = f"{name}-{version}.dist-info"
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *lines, ""]))
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def wheel_of(installed: importlib.metadata.Distribution, folder: Path) -> None:
    """A package as it is installed here, without its commands."""
    files = [file for file in installed.files if ".." not in file.parts and "__pycache__" not in file.parts]
    (info,) = {file.parts[0] for file in files if file.parts[0].endswith(".dist-info")}
    with zipfile.ZipFile(folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl", "w") as target:
        for file in files:
            if file.name != "RECORD":
                target.write(installed.locate_file(file), str(file))
        target.writestr(f"{info}/RECORD", "")


def installed_here(wanted: list[str], there: dict[str, str]) -> dict[str, importlib.metadata.Distribution]:
    """The packages `wanted`, and what they need that is not `there`, package to version, or too old."""
    found, needs = {}, [Requirement(name) for name in wanted]
    while needs:
        need = needs.pop()
        name = canonicalize_name(need.name)
        is_there = name not in wanted and name in there and need.specifier.contains(there[name])
        if not is_there and name not in found and (not need.marker or need.marker.evaluate({"extra": ""})):
            found[name] = importlib.metadata.distribution(name)
            needs += map(Requirement, found[name].requires or [])
    return found


@pytest.mark.slow
def test_installing_leaves_the_torch_that_is_there(tmp_path):
    """Without network: pip finds the packages of this environment in a folder, next to newer ones that ask for a newer
    torch, which is there too."""
    (site,) = (REPOSITORY / ".venv-foundry/lib").glob("python3.*/site-packages")
    subprocess.run(
        [REPOSITORY / ".venv-foundry/bin/python", "-m", "venv", "--without-pip", tmp_path / "venv"], check=True
    )
    (own,) = (tmp_path / "venv/lib").glob("python3.*/site-packages")
    (own / "foundry.pth").write_text(f"{site}\n")
    empty, packages = tmp_path / "empty", tmp_path / "packages"
    empty.mkdir()
    packages.mkdir()
    there = {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions(path=[str(site)])}
    assert there["torch"] != importlib.metadata.version("torch") and "deepspeed" not in there
    for distribution in installed_here(["deepspeed", "ninja", "wandb"], there).values():
        wheel_of(distribution, packages)
    wheel(packages, "torch", "99.0")
    wheel(packages, "deepspeed", "99.0", ["torch>=99"])
    wheel(packages, "transformers", "99.0", ["torch>=99"])

    def python(code: str, find_links: Path, **pip: str) -> subprocess.CompletedProcess:
        pip = {"PIP_FIND_LINKS": str(find_links), "PIP_CONFIG_FILE": "/dev/null"} | (pip or {"PIP_NO_INDEX": "1"})
        command = [str(tmp_path / "venv/bin/python"), "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=environment(cold=True, **pip), capture_output=True, text=True)

    modules = "torch, transformers, datasets, accelerate, omegaconf, rouge_score"
    before = json.loads(python(SEEN.format(modules), empty).stdout)
    failed = python(INSTALL.format("deepspeed"), empty)
    assert (
        "CellFailed: pip could not install deepspeed" in failed.stderr and "No matching distribution" in failed.stderr
    )
    offline = python(INSTALL.format("deepspeed"), empty, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    line = offline.stderr.splitlines()[-1]
    assert "CellFailed: deepspeed" in line and "cannot be installed" in line and "Settings → Internet" in line

    done = python(INSTALL.format("deepspeed"), packages)
    assert done.returncode == 0, done.stderr
    versions = dict(line.split() for line in done.stdout.splitlines()[1:])
    assert versions["torch"] == there["torch"] and versions["transformers"] == there["transformers"]
    assert versions["deepspeed"] == importlib.metadata.version("deepspeed")
    after = python(SEEN.format(f"{modules}, deepspeed, wandb"), empty)
    assert after.returncode == 0, after.stderr
    assert json.loads(after.stdout.splitlines()[-1]) == [*before, "deepspeed", "wandb"]
    assert Path(before[1]).is_relative_to(site) and not list(own.glob("torch*"))
    again = python(INSTALL.format("deepspeed"), empty)  # all is there: pip is not even asked
    assert again.returncode == 0 and again.stdout == done.stdout.split("\n", 1)[1], again.stderr
