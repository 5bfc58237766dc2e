"""Other libraries' trainers on our rows, with our keys and our record: what bench/ measures next to ours.

TRL's SFTTrainer or transformers' Trainer reads the same full blocks of tokens, in batches of the same size, and writes
`metrics.jsonl` and `summary.json` as a train.py does. The figures of every step are logged, and so waited for, as ours
are. Needs what bench/peers/requirements.txt names.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from common import data, errors, models, runtime
from common.config import BaseConfig, accumulation_steps, key, parse_config
from common.run_folder import RunFolder

ZERO_2_OFFLOAD = {  # as transformers' page on DeepSpeed shows it
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
ZERO_3 = ZERO_2_OFFLOAD | {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
}
DEEPSPEED = {"none": None, "zero2-offload": ZERO_2_OFFLOAD, "zero3": ZERO_3}


@dataclass
class Peer:
    """Section `peer`: which trainer, and what it does that its documentation recommends."""

    trainer: str = key("trl", "whose Trainer", choices=("trl", "transformers"))
    liger: bool = key(False, "Liger's kernels (use_liger_kernel)")
    fsdp: bool = key(False, "FSDP2 (fsdp=True)")
    deepspeed: str = key("none", "DeepSpeed, as transformers' page configures it", choices=tuple(DEEPSPEED))


@dataclass
class Config(BaseConfig):
    peer: Peer = field(default_factory=Peer)


class Recorder(TrainerCallback):
    """Writes each step into the run folder. `loss.item()`, of which a log is made, waits for the step's end."""

    def __init__(self, run: RunFolder, tokens: int):
        self.run, self.tokens, self.clock = run, tokens, 0.0

    def on_step_begin(self, args, state, control, **_):
        self.clock = self.clock or time.perf_counter()

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:  # not the summary at the end
            now = time.perf_counter()
            norm = float(logs.get("grad_norm", math.nan))
            figures = (state.epoch, logs["loss"], logs["learning_rate"], norm, self.tokens, now - self.clock)
            self.run.log_step(state.global_step, *figures)
            self.clock = now


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


def train(cfg: Config) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    runtime.limit_gpu_memory(cfg.runtime, device)
    dtype, reason = runtime.resolve_precision(cfg.train.precision, device)
    runtime.only_main_shows_progress(rank == 0)
    options = {
        "output_dir": str(Path(cfg.output_dir) / "trainer"),
        "max_steps": cfg.train.max_steps,
        "per_device_train_batch_size": cfg.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(cfg, world_size),
        "learning_rate": cfg.train.learning_rate,
        "weight_decay": cfg.train.weight_decay,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "gradient_checkpointing": cfg.train.activation_checkpointing,
        "torch_compile": cfg.train.compile,
        "use_liger_kernel": cfg.peer.liger,
        "ddp_find_unused_parameters": False,
        "use_cpu": device.type == "cpu",
        "deepspeed": DEEPSPEED[cfg.peer.deepspeed],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if cfg.peer.fsdp:
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}
    if cfg.peer.trainer == "trl":
        from trl import SFTConfig as Arguments
        from trl import SFTTrainer

        options |= {"max_length": cfg.data.max_length}
    else:
        Arguments = TrainingArguments
    arguments = Arguments(**options)  # before the model: DeepSpeed's stage 3 divides it while it is made
    environment = runtime.describe_environment(world_size, reason)
    with RunFolder(cfg, "peers", rank == 0, environment, exports=False) as run:
        tokenizer = models.load_tokenizer(cfg.model)
        rows, _ = data.tokenized_rows(cfg.data, cfg.seed, tokenizer, show_progress=rank == 0)
        model = models.load_model(cfg.model, cfg.seed)
        run.begin(model, device, dtype, 0, cfg.train.max_steps, None)
        blocks = datasets.Dataset.from_dict({"input_ids": rows.tokens.reshape(len(rows), -1)})
        # One epoch of as many rows as are needed: each epoch ends with a smaller batch.
        needed = cfg.train.max_steps * cfg.train.global_batch_size
        blocks = blocks.select(i % len(rows) for i in range(needed))
        shared = {"model": model, "args": arguments, "train_dataset": blocks, "processing_class": tokenizer}
        trainer = SFTTrainer(**shared) if cfg.peer.trainer == "trl" else Trainer(**shared, data_collator=collate)
        trainer.add_callback(Recorder(run, cfg.train.global_batch_size * cfg.data.max_length))
        trainer.train()
        run.finish("completed")


if __name__ == "__main__":
    errors.run(lambda: train(parse_config(Config, __file__)))
