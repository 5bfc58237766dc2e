"""The files around the code: workflows, templates, citation, and checks that are the same wherever they run."""

import json
import re
import tomllib

import pytest
import yaml
from conftest import REPOSITORY

from tools.kaggle import origin

GITHUB = REPOSITORY / ".github"
MAKEFILE = (REPOSITORY / "Makefile").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))


def targets(text: str) -> set[str]:
    """The targets that a text of commands names."""
    return set(re.findall(r"\bmake (?:-\S+ )*([.\w/-]+)", text))


def known_targets() -> set[str]:
    return set(re.findall(r"^([.\w/-]+):", MAKEFILE, re.MULTILINE)) - {".PHONY"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_the_makefile_with_read_access_and_a_timeout(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert 0 < job["timeout-minutes"] <= 120
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    assert targets(commands) and targets(commands) <= known_targets()
    (setup,) = (step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert setup["cache"] == "pip" and (REPOSITORY / setup["cache-dependency-path"]).is_file()


def test_pull_requests_get_the_fast_checks_and_nights_all_of_them():
    ci, nightly = (yaml.safe_load((GITHUB / f"workflows/{name}.yml").read_text()) for name in ("ci", "nightly"))
    # YAML 1.1, which PyYAML reads, takes the key `on` for true.
    assert "pull_request" in ci[True] and {"schedule", "workflow_dispatch"} <= nightly[True].keys()
    assert targets(json.dumps(ci["jobs"])) == {"lint", "test-fast"}
    (job,) = nightly["jobs"].values()
    assert "test" in targets(json.dumps(job)) and job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]


def test_issue_forms_have_what_github_asks_for():
    for path in GITHUB.glob("ISSUE_TEMPLATE/*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.name != "config.yml":
            assert form["name"] and form["description"] and form["body"]
            ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
            assert len(ids) == len(set(ids))
    text = (GITHUB / "ISSUE_TEMPLATE/bug.yml").read_text()
    assert all(wanted in text for wanted in ("summary.json", "environment.json", "command"))


def test_documents_name_targets_that_exist():
    for path in (GITHUB / "pull_request_template.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"):
        named = targets("\n".join(re.findall(r"`(make [^`]*)`", path.read_text())))
        assert named <= known_targets(), path
    container = json.loads((REPOSITORY / ".devcontainer/devcontainer.json").read_text())
    assert targets(container["postCreateCommand"]) == {".venv/ready"}


def test_the_citation_is_of_this_version_and_address():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["repository-code"] == origin(REPOSITORY)[0]
    licence = (REPOSITORY / "LICENSE").read_text()
    assert licence.startswith(citation["license"]) and citation["authors"][0]["name"] in licence


def test_each_check_of_make_lint_is_one_before_a_commit():
    recipe = MAKEFILE.split("\nlint:")[1].split("\n\n")[0]
    lines = [line.strip() for line in recipe.splitlines()[1:]]
    assert not [
        line for line in lines if "&&" in line and not line.startswith("#")
    ]  # `set -e` overlooks all but the last
    commands = [line.rpartition(" -0 ")[2] for line in lines]  # without what hands the files to it
    checks = [found[0] for line in commands if (found := re.match(r"python -m [\w.]+|ruff \w+|\w+", line))]
    assert len(checks) == 9
    (local,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in local["hooks"]]
    for check in checks:
        assert any(entry.startswith(check) for entry in entries), check


def test_pinned_tools_have_one_version():
    pinned = (REPOSITORY / "requirements.txt").read_text().splitlines()
    exact = [name for name in PROJECT["project"]["optional-dependencies"]["dev"] if "==" in name]
    assert len(exact) == 3 and set(exact) <= set(pinned)


def test_only_pyproject_asks_for_an_owner():
    """Wherever else an address has the placeholder, a tool wrote it: notebooks, Kaggle's metadata, citation, badges."""
    owner = re.compile(r"\bOWNER/")
    written = {".ipynb", ".json", ".cff"}
    paths = [*REPOSITORY.glob("*.*"), *REPOSITORY.glob("*/*.*"), *GITHUB.rglob("*.*"), *REPOSITORY.glob("docs/**/*.*")]
    for path in paths:
        if path.suffix in {".md", ".toml", ".yml", ".yaml", ".py", ".sh", *written} and path.parent.name != "tests":
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if owner.search(line)]
            allowed = path.suffix in written or path.name in ("pyproject.toml", "README.md")
            assert allowed or not lines, path
