"""Where code may live: what a project may import, and what `common` may."""

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import PROJECTS, REPOSITORY

PACKAGES = ("common", "launchers", "tools")


def imports(path) -> set[str]:
    """The modules that a file imports, anywhere in it; not those that only a type checker sees."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("common", {"common"}), ("launchers", {"common", "launchers"}), ("tools", {"common", "tools"})],
)
def test_a_package_imports_only_what_lies_below_it(package, allowed):
    for path in (REPOSITORY / package).glob("*.py"):
        found = {name.partition(".")[0] for name in imports(path)}
        assert not found & {*PACKAGES, *PROJECTS, "bench"} - allowed, path


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_needs_common_only(project):
    for path in (REPOSITORY / project).glob("*.py"):
        found = {name.partition(".")[0] for name in imports(path)}
        # eval.py may have been started with a Python that lacks the packages
        assert found & {*PACKAGES, "bench"} <= {"common"} | ({"launchers"} if path.name == "eval.py" else set()), path


def test_common_never_imports_a_projects_framework():
    for path in (REPOSITORY / "common").glob("*.py"):
        assert not {name.partition(".")[0] for name in imports(path)} & {"deepspeed", "ray", "composer", "llmfoundry"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package):
    graph = {}
    for path in (REPOSITORY / package).glob("*.py"):
        name = package if path.stem == "__init__" else f"{package}.{path.stem}"
        modules = {p.stem for p in (REPOSITORY / package).glob("*.py")}
        graph[name] = {n for n in imports(path) if n.startswith(f"{package}.") and n.split(".")[1] in modules} - {name}
    order = [*TopologicalSorter(graph).static_order()]  # raises CycleError
    assert len(order) >= len(graph)


@pytest.mark.parametrize("project", PROJECTS)
def test_every_project_has_the_same_skeleton(project):
    folder = REPOSITORY / project
    for name in ("README.md", "train.py", "eval.py", "settings.py", "launch.sh", "config.yaml", "smoke.yaml"):
        assert (folder / name).is_file(), f"{project}/{name}"
    for kind in ("train", "eval"):
        for name in (f"{kind}.py", f"{kind}.ipynb", f"{kind}/kernel-metadata.json"):
            assert (folder / "notebooks" / name).is_file(), f"{project}/notebooks/{name}"
