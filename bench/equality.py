"""Train one model on the same rows with all seven projects, and write how far each is from a plain loop.

    python bench/equality.py            # results/equality/losses.json and losses.png; no GPU, a few minutes

A tiny Llama in fp32, prompts masked, so that the two processes of a run have unequal numbers of targets; the real
launch scripts. Needs .venv-foundry too (`make .venv-foundry/ready`). The plain loop is transformers' own loss on whole
global batches, with torch's AdamW.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from common import data, models, runtime
from common.config import REPOSITORY, BaseConfig, load_config
from common.plots import save_figure, style_axes
from common.report import read_metrics

STEPS = 30
SETTINGS = [
    "model.name=tiny:llama", "data.eval_rows=64", f"train.max_steps={STEPS}", "train.global_batch_size=16",
    "train.micro_batch_size=4", "train.learning_rate=1e-3", "train.lr_schedule=constant", "train.warmup_steps=0",
    "train.precision=fp32", f"eval.every={STEPS}", "checkpoint.every=0", "tracking.backend=none",
]  # fmt: skip
# What starts the processes, and what else a project needs: of ray-tune's search, one trial by itself.
PROJECTS = {
    "pytorch-ddp": ("torchrun", []),
    "pytorch-fsdp": ("torchrun", []),
    "deepspeed-offload": ("deepspeed", []),
    "deepspeed-pipeline": ("deepspeed", []),
    "llm-foundry-finetune": ("composer", []),
    "ray-train": ("ray", []),
    "ray-tune": ("ray", ["search.trials=1", "search.scheduler=none"]),
}


def plain_loop(settings: list[str]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of pytorch-ddp's smoke.yaml with `settings`, by nothing of ours but the rows.

    The reference: `model(input_ids, labels)` on whole global batches, and `torch.optim.AdamW`.
    """
    cfg = load_config(BaseConfig, REPOSITORY / "pytorch-ddp/smoke.yaml", settings)
    tokenizer = models.load_tokenizer(cfg.model)
    rows = data.tokenize(data.load_rows(cfg.data, cfg.seed)[0], cfg.data, tokenizer)
    model = models.load_model(cfg.model, cfg.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.train.learning_rate, weight_decay=0)
    curve = []
    for indices in data.StepSampler(rows, cfg, rank=0, world_size=1):
        # No mask: padding is on the right, and a tiny Llama's first token is the one that pads.
        loss = model(**data.collate([rows[i] for i in indices], tokenizer.pad_token_id)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve


def train(project: str, settings: list[str]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of the project's run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [f"{project}/launch.sh", "--config", "smoke.yaml", *SETTINGS, *settings, f"output_dir={folder}/run"]
        variables = {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | variables, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{project} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return [(r["loss"], r["grad_norm"]) for r in read_metrics(Path(folder) / "run") if "loss" in r]


def draw(record: dict, path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "distance of each project's loss from the plain loop's", "relative difference (at least 1e-9)")
    for project, curve in record["projects"].items():
        differences = [abs(a[0] / b[0] - 1) for a, b in zip(curve, record["plain"], strict=True)]
        axes.plot(range(1, STEPS + 1), [max(d, 1e-9) for d in differences], label=project, marker=".")
    axes.axhline(1e-4, color="black", linestyle="--", linewidth=1, label="bound of the tests")
    axes.set(yscale="log", ylim=(5e-10, 1e-2))
    axes.legend(fontsize=8, ncol=2)
    save_figure(figure, path)


def main() -> None:
    record = {
        "date": datetime.date.today().isoformat(),
        "environment": runtime.describe_environment(2, "fp32: as set"),
        "settings": dict(setting.split("=", 1) for setting in SETTINGS),
        "launchers": {project: launcher for project, (launcher, _) in PROJECTS.items()},
        "plain": plain_loop(SETTINGS),
        "projects": {},
    }
    for project, (_, settings) in PROJECTS.items():
        curve = record["projects"][project] = train(project, settings)
        print(f"{project:22} loss {curve[0][0]:.6f} -> {curve[-1][0]:.6f}", flush=True)
    folder = REPOSITORY / "results/equality"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "losses.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(record, folder / "losses.png")


if __name__ == "__main__":
    main()
