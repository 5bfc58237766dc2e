"""What ray-tune asks of a Hub before its search. That its config.yaml runs as it is shipped is in test_notebooks.py."""

import pytest
from launching import error_line, run

PROJECT = "ray-tune"
# Only the budget and the number of trials are changed; the least budget with a rung and the warm-ups below it.
SMALL = ["search.trials=2", "train.max_steps=27"]


@pytest.mark.slow
def test_an_unknown_data_set_and_a_token_without_rights_stop_before_the_search(hub, tmp_path):
    options = {"config": "config.yaml", "exit_code": 2, "cold": True}
    where = [*SMALL, f"output_dir={tmp_path}/run"]
    line = error_line(run(PROJECT, *where, "data.name=stanfordnlp/imbd", **options, **hub.environment(tmp_path / "a")))
    assert "data.name=stanfordnlp/imbd" in line
    push = [*where, "hub.repo_id=reader/model"]
    line = error_line(run(PROJECT, *push, **options, **hub.environment(tmp_path / "b", token="hf_reader")))
    assert "hub.repo_id=reader/model" in line and "may not write" in line
    assert not (tmp_path / "run/trials").exists()
