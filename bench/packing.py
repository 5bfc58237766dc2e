"""Measure padded, wrapped and packed rows, and write a record of each case to results/packing/.

    python bench/packing.py --model FOLDER --text gsm8k-train.jsonl --only t4      # a T4's memory and kernels, fp16
    python bench/packing.py --model FOLDER --text gsm8k-train.jsonl --only bf16    # two GPUs as they are
    python bench/packing.py --text gsm8k-train.jsonl --only loss                   # an epoch of SmolLM2 with each
    python bench/packing.py --blocks smollm2 gsm8k-train.jsonl                     # blocks next to TRL's; no GPU

FOLDER is made by bench/real_shapes.py; the file has lines of `prompt` and `response`. Padded rows are measured with the
settings of the blocks, and with as many rows per batch as these hold. TRL has a folder of its own: see
bench/peers/requirements.txt.
"""

import datetime
import importlib.metadata
import json
import sys
from pathlib import Path

import yaml
from cases import REPOSITORY, Case, measure
from omegaconf import OmegaConf

from common import data, models, runtime
from common.config import BaseConfig, DataConfig, ModelConfig
from common.packing import best_fit_decreasing
from common.report import read_json

ROWS_PER_BLOCK = 6.5  # of GSM8K, in blocks of 1,024 tokens
GSM8K = ["data.format=prompt-response", "data.max_length=1024", "data.train_rows=0", "data.eval_rows=200"]
# Sequences per step and per micro-batch, what else is set, and the projects.
SETTINGS = {
    "t4": (
        (32, 8),
        ["train.precision=fp16", "runtime.gpu_memory_limit_gib=14.7", "train.activation_checkpointing=true",
         "train.max_steps=30"],
        ["pytorch-ddp", "pytorch-fsdp"],
    ),
    "bf16": (
        (32, 8),
        ["train.precision=bf16", "train.activation_checkpointing=false", "train.max_steps=30"],
        ["pytorch-ddp", "pytorch-fsdp"],
    ),
    "loss": (
        (16, 8),
        ["train.precision=bf16", "model.name=smollm2", "model.random_weights=false", "train.epochs=1",
         "train.learning_rate=2e-4", "eval.batch_size=32"],
        ["pytorch-ddp"],
    ),
}  # fmt: skip
PACKINGS = {
    "padded": ("padded", "none", 1),
    "padded-more": ("padded, as many tokens per batch", "none", ROWS_PER_BLOCK),
    "wrapped": ("`wrapped`", "wrapped", 1),
    "documents": ("`documents`", "documents", 1),
}


def places(run: Path) -> dict:
    """The tokens that the run trained on, and which share they are of the places in its micro-batches."""
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    common = {name: settings[name] for name in ("model", "data", "train", "seed")}
    cfg: BaseConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(BaseConfig), common))
    tokenizer = models.load_tokenizer(cfg.model)
    rows = data.tokenize(data.load_rows(cfg.data, cfg.seed)[0], cfg.data, tokenizer)
    ranks = read_json(run / "environment.json")["world_size"]
    loaders = [data.step_loader(rows, cfg, tokenizer.pad_token_id, rank, ranks) for rank in range(ranks)]
    # Not by iterating: a loader pins its batches, and this process must hold no memory of a GPU.
    steps = [loader.collate_fn([rows[i] for i in chosen]) for loader in loaders for chosen in loader.batch_sampler]
    tokens = sum(step.tokens for step in steps)
    return {"tokens": tokens, "filled": tokens / sum(m["labels"].numel() for step in steps for m in step.micro_batches)}


def weights(record: dict) -> dict:
    return {"weights": "SmolLM2-135M-Instruct"} if record["case"].startswith("loss") else {}


CASES = {
    f"{setting}-{project}-{name}": Case(
        label,
        [*GSM8K, *more, f"data.packing={packing}", f"train.global_batch_size={round(sequences * factor)}",
         f"train.micro_batch_size={round(micro * factor)}"],
        as_t4=setting == "t4",
        project=project,
        look=places,
    )
    for setting, ((sequences, micro), more, projects) in SETTINGS.items()
    for project in projects
    for name, (label, packing, factor) in PACKINGS.items()
    if (setting, name) != ("loss", "padded")  # its steps would be six times as many, and so much smaller
}  # fmt: skip


def compare_blocks(model: str, file: str) -> None:
    """results/packing/blocks.json: into how many blocks we and TRL pack the same rows, by their size."""
    import datasets

    sys.path.append(str(REPOSITORY / "build/peers"))
    from trl import pack_dataset

    found = []
    for size in (256, 512, 1024, 2048):
        settings = DataConfig(name=file, format="prompt-response", max_length=size, packing="none")
        rows = data.tokenize(data.load_rows(settings, 42)[0], settings, models.load_tokenizer(ModelConfig(model)))
        theirs = datasets.Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in rows]})
        found.append(
            {
                "size": size,
                "ours": len(best_fit_decreasing(rows.lengths, size)),
                "trl": len(pack_dataset(theirs, size, "bfd")),  # a thousand rows at a time
                "trl_at_once": len(pack_dataset(theirs, size, "bfd", {"batch_size": len(rows)})),
                "least": -(-int(rows.lengths.sum()) // size),  # if rows could be cut anywhere
                "rows": len(rows),
            }
        )
        print(found[-1])
    record = {
        "date": datetime.date.today().isoformat(),
        "measured_by": f"python bench/packing.py --blocks {model} {Path(file).name}",
        "environment": runtime.describe_environment(1, "") | {"trl": importlib.metadata.version("trl")},
        "sizes": found,
    }
    target = REPOSITORY / "results/packing/blocks.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--blocks"]:
        compare_blocks(*sys.argv[2:])
    else:
        measure("packing", CASES, __doc__, weights)
