"""What the tests' Hub serves: tiny models and data sets under the real names, with the real file kinds and columns.

python tests/hub_content.py FOLDER && python tests/hub_server.py --root FOLDER
"""

import csv
import io
import json
import sys
from pathlib import Path

import torch
from hub_server import HubServer

from common import models, pydoc_data
from common.config import ModelConfig

MODELS = {
    "Qwen/Qwen2-0.5B-Instruct": "tiny:qwen2",
    "facebook/opt-1.3b": "tiny:opt",
    "meta-llama/Llama-3.2-1B-Instruct": "tiny:llama",
    "bigscience/bloomz-1b1": "tiny:bloom",
}
GATED = {"meta-llama/Llama-3.2-1B-Instruct": ["reader", "writer"]}  # and who was granted access
TOKENS = {"hf_reader": ("reader", "read"), "hf_writer": ("writer", "write"), "hf_stranger": ("stranger", "write")}


def fill(hub: HubServer, folder: Path) -> None:
    """Build every model and data set of the seven projects in `folder` and hand them to `hub`."""
    for name, tiny in MODELS.items():
        target = folder / name
        model = models.load_model(ModelConfig(name=tiny), seed=0)
        model.save_pretrained(target)
        models.load_tokenizer(ModelConfig(name=tiny)).save_pretrained(target)
        if tiny == "tiny:opt":  # published as a pickle of fp16 weights, without safetensors
            (target / "model.safetensors").unlink()
            weights = {key: tensor.half() for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
            torch.save(weights, target / "pytorch_model.bin")
        hub.add_model(name, target)
    rows = pydoc_data.rows()
    abstracts = [row["text"] for row in rows]
    abstracts[100] = abstracts[2000] = " \n"  # the published data set has blank rows
    hub.add_dataset("ash001/arxiv-abstract", {"train.jsonl": _jsonl({"text": text} for text in abstracts)})
    dolly = (  # as published, three in ten rows have a text that the answer is in
        {"instruction": row["prompt"], "response": row["response"]}
        | ({"context": row["text"], "category": "closed_qa"} if i % 10 < 3 else {"context": "", "category": "open_qa"})
        for i, row in enumerate(rows)
    )
    hub.add_dataset("databricks/databricks-dolly-15k", {"databricks-dolly-15k.jsonl": _jsonl(dolly)})
    halves = rows[:2000], rows[2000:2800]
    imdb = {f"{split}.csv": _csv(part) for split, part in zip(("train", "test"), halves, strict=True)}
    hub.add_dataset("stanfordnlp/imdb", imdb)


def _jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _csv(rows: list[dict]) -> bytes:
    """As IMDB is published: sorted by label."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["text", "label"])
    writer.writerows([row["text"], int(i >= len(rows) // 2)] for i, row in enumerate(rows))
    return table.getvalue().encode()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    fill(HubServer(root), root / "made")
