"""`make seven`: its report, with a project that trains and one that cannot."""

import json
import sys

import pytest
from conftest import REPOSITORY

from bench import seven


@pytest.mark.slow
def test_a_project_that_fails_is_in_the_report_and_hides_no_other(tmp_path, monkeypatch, capsys):
    few = ["train.max_steps=2", "eval.every=2", "train.micro_batch_size=16"]  # two ranks of 16: more than a batch
    call = ["seven.py", "--projects", "pytorch-ddp", "deepspeed-pipeline", "--folder", str(tmp_path), "--set", *few]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit) as end:
        seven.main()
    assert end.value.code == 1
    report = (tmp_path / "report.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in report.splitlines() if line.startswith("|")}
    assert (
        "failed" in rows["`pytorch-ddp` **failed**"] and "- `pytorch-ddp`: error: train.global_batch_size=16" in report
    )
    pipeline = [cell.strip() for cell in rows["`deepspeed-pipeline`"].strip("|").split("|")]
    plain = [cell.strip() for cell in rows["plain loop"].strip("|").split("|")]
    assert pipeline[1:4] == plain[1:4] and float(pipeline[4]) < 1e-5
    assert float(pipeline[9]) > 1 and pipeline[8].endswith(" s")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<table>" in page and 'src="curves.png' not in page
    shown = capsys.readouterr().out
    assert "pytorch-ddp            failed: error:" in shown and "from the plain loop" in shown


def test_a_record_is_of_all_projects(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["seven.py", "--record", "--projects", "ray-tune"])
    with pytest.raises(SystemExit):
        seven.main()
    assert "--record is of all projects" in capsys.readouterr().err


def test_the_distance_is_the_largest_and_skipped_steps_have_none():
    plain = [(2.0, 1.0), (1.0, None), (4.0, 1.0)]
    assert seven.furthest([(2.0, 1.1), (1.1, 5.0)], plain, 0) == pytest.approx(0.1)
    assert seven.furthest([(2.0, 1.1), (1.1, 5.0)], plain, 1) == pytest.approx(0.1)
    assert seven.furthest([], plain, 0) is None


def test_the_projects_are_all_there_are_and_the_published_table_has_each():
    from conftest import PROJECTS

    published = json.loads((REPOSITORY / "results/equality/losses.json").read_text())
    assert {*seven.PROJECTS} == {*PROJECTS} == {*published["projects"]}
