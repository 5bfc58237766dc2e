"""bench/agreement.py: it separates an exact loss from a mean of means, and finds no difference where there is none."""

import json
import sys

import pytest

from bench import agreement


@pytest.mark.slow
def test_a_mean_of_means_is_found_out_and_equal_targets_hide_it(monkeypatch, capsys, tmp_path):
    def distances(*options: str) -> list[float]:
        monkeypatch.setattr(sys, "argv", ["agreement.py", *options])
        agreement.main()
        lines = capsys.readouterr().out.splitlines()
        return [float(line.split("weights ")[1].split()[0]) for line in lines if "weights" in line]

    assert min(distances("--only", "ddp")) > 0.1
    assert max(distances("--equal", "--only", "ddp")) < 1e-4


@pytest.mark.slow
def test_rows_of_the_control_have_equally_many_targets(tmp_path):
    agreement.prepare(tmp_path, equal=True)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {sum(label != -100 for label in row["labels"][1:]) for row in rows} == {agreement.SHORTEST}
    agreement.prepare(tmp_path, equal=False)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len({sum(label != -100 for label in row["labels"][1:]) for row in rows}) > 10
    assert len(rows) == agreement.STEPS * 16
