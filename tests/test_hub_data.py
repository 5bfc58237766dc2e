"""Rows of a dataset on the Hub are those of its files, as they are written there; also offline, once downloaded."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from hub_server import HubServer

SCRIPT = """
import json, sys, datasets
from common.config import DataConfig
from common.data import load_rows
from common.errors import UserError
datasets.disable_progress_bars()
for name, split in json.loads(sys.argv[1]):
    try:
        data = DataConfig(name=name, split=split, format="prompt-response", prompt_template="{n}{prompt}", eval_rows=1)
        print(json.dumps(sorted(row["response"] + row["n"] for part in load_rows(data, 1) for row in part)))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_texts_of_the_hub_are_read_as_they_are_written(tmp_path):
    texts = ["2024-01-02", "NA", "01234", "1.50", ""]
    rows = [{"prompt": f"p{i}", "response": text, "n": text} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows[:1] * 2).encode()  # dates only: a reader may guess
    cells = "prompt,response,n\n" + "".join(f"{row['prompt']},{row['response']},{row['n']}\n" for row in rows)
    with HubServer(tmp_path / "hub") as hub:
        hub.add_dataset("me/dates", {"train.jsonl": lines, "test.jsonl": lines + lines})
        hub.add_dataset("me/cells", {"data/cells.csv": cells.encode()})
        asked = [("me/dates", "train"), ("me/dates", "test[:3]"), ("me/dates", "dev"), ("me/cells", "train")]
        for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
            variables = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(REPOSITORY)} | offline
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, json.dumps(asked)],
                env=os.environ | variables, capture_output=True, text=True, check=True,
            )  # fmt: skip
            train, test, dev, cells = (json.loads(line) for line in done.stdout.splitlines()[-4:])
            assert train == ["2024-01-022024-01-02"] * 2 and test == ["2024-01-022024-01-02"] * 3
            assert "me/dates has no split dev: its splits are train, test" in dev
            assert cells == sorted(text + text for text in texts)
