"""Measure deepspeed-offload on this machine's GPUs and write a record of each case to results/deepspeed-offload/.

python bench/offload.py                                     # the model and data of config.yaml, from the Hub
python bench/offload.py --model FOLDER --text FILE.jsonl    # without the Hub: real shapes (bench/real_shapes.py)
python bench/offload.py --only 512-micro-16 two-gpus        # cases whose names begin so

A record holds the preflight's prediction (`environment.memory_plan`) next to the peaks that were measured, the host's
also by phase. The host's are those of the whole process tree, launcher included.
"""

from functools import partial

from cases import Case, measure

T4 = ["train.precision=fp16", "runtime.gpu_memory_limit_gib=14.7", "train.activation_checkpointing=true",
      "train.max_steps=20", "data.eval_rows=64", "data.train_rows=0"]  # fmt: skip


def settings(length: int, micro: int, batch: int = 0) -> list[str]:
    """`batch` sequences a step, by default those of one micro-batch: no accumulation."""
    return [
        *T4,
        f"data.max_length={length}",
        f"train.micro_batch_size={micro}",
        f"train.global_batch_size={batch or micro}",
    ]


offload = partial(Case, gpus=1, as_t4=True, launcher="deepspeed")

CASES = {
    # The tables of micro-batches.
    "512-micro-4": offload("4 × 512", settings(512, 4)),
    "512-micro-16": offload("16 × 512", settings(512, 16)),
    "512-micro-32": offload("32 × 512", settings(512, 32)),
    "512-micro-64": offload("64 × 512", settings(512, 64)),
    "1024-micro-4": offload("4 × 1,024", settings(1024, 4)),
    "1024-micro-8": offload("8 × 1,024", settings(1024, 8)),
    "1024-micro-16": offload("16 × 1,024", settings(1024, 16)),
    "1024-micro-32": offload("32 × 1,024", settings(1024, 32)),
    # What each thing costs or spares.
    "host-accumulation": offload("1 × 512, four times", settings(512, 1, 4)),
    "host-deepspeed": offload(
        "1 × 512, four times, DeepSpeed's own page-locking and buckets",
        [*settings(512, 1, 4), "offload.ds_config=bench/ds_default.json"],
    ),
    "host-16-deepspeed": offload(
        "16 × 512, DeepSpeed's own page-locking and buckets",
        [*settings(512, 16), "offload.ds_config=bench/ds_default.json"],
    ),
    "host-16-pageable": offload("16 × 512, nothing page-locked", [*settings(512, 16), "offload.page_lock=false"]),
    "host-16-torch-adamw": offload("16 × 512, PyTorch's AdamW", [*settings(512, 16), "offload.optimizer=torch"]),
    "two-gpus": offload("8 × 1,024 on each of two GPUs", settings(1024, 8, 16), gpus=2),
    "trainer": Case(
        "transformers' Trainer, ZeRO-2 offload, 16 × 1,024",
        [*settings(1024, 16), "peer.trainer=transformers", "peer.deepspeed=zero2-offload"],
        gpus=1,
        as_t4=True,
        project="bench/peers",
    ),
    "bf16": offload("16 × 1,024, bf16", [*settings(1024, 16), "train.precision=bf16"], as_t4=False),
}


def host_phases(record: dict) -> dict:
    """The host's peaks so far at three points of the run: a phase that adds nothing shows the figure before it."""
    first = next(step for step in record["first_steps"] if "loss" in step)
    return {
        "host_peaks_gib": {
            "load and first step": first["peak_host_gib"],
            "training": record["last_steps"][0]["peak_host_gib"],
            "checkpoint and export": record["summary"]["peak_host_gib"],
        }
    }


if __name__ == "__main__":
    measure("deepspeed-offload", CASES, __doc__, host_phases)
