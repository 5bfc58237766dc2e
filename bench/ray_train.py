"""Measure ray-train on this machine's GPUs and write a record of each case to results/ray-train/.

    python bench/ray_train.py                                     # the model and data of config.yaml, from the Hub
    python bench/ray_train.py --model FOLDER --text FILE.jsonl    # without the Hub: real shapes (bench/real_shapes.py)
    python bench/ray_train.py --only 2gpu-micro-1                 # cases whose names begin so

With --text, give a file of few rows, or rows of the training set are held out: there is no `test` split. What Ray costs
is the difference to `-plain`, the same loop in the same number of processes that DeepSpeed's launcher starts.
"""

from functools import partial

from cases import Case, measure

T4 = ["train.precision=fp16", "runtime.gpu_memory_limit_gib=14.7", "train.max_steps=25", "data.eval_rows=64",
      "data.eval_split=", "data.train_rows=0", "data.max_length=512", "data.packing=wrapped",
      "train.global_batch_size=16", "train.activation_checkpointing=true"]  # fmt: skip

plain = partial(Case, launcher="deepspeed")


def ray(label: str, settings: list[str], gpus: int = 2) -> Case:
    return Case(label, [*settings, f"ray.workers={gpus}"], gpus=gpus, launcher="python")


def micro(size: int) -> list[str]:
    return [*T4, f"train.micro_batch_size={size}"]


def one_gpu(size: int) -> list[str]:
    return [setting for setting in micro(size) if "memory_limit" not in setting]


CASES = {
    **{f"2gpu-micro-{size}": ray(f"micro-batch {size}", micro(size)) for size in (1, 2, 4, 8)},
    "2gpu-micro-1-no-checkpointing": ray(
        "micro-batch 1, without checkpointing", [*micro(1), "train.activation_checkpointing=false"]
    ),
    "2gpu-micro-1-plain": plain("micro-batch 1, without Ray", micro(1)),
    "2gpu-micro-4-plain": plain("micro-batch 4, without Ray", micro(4)),
    "2gpu-micro-4-fsdp": Case("`pytorch-fsdp`, micro-batch 4", micro(4), project="pytorch-fsdp"),
    "2gpu-micro-4-trainer": Case(
        "transformers' Trainer, ZeRO-3, micro-batch 4",
        [*micro(4), "peer.trainer=transformers", "peer.deepspeed=zero3"],
        project="bench/peers",
    ),
    # One GPU holds all of the state: 16 GiB for BLOOMZ-1b1.
    "1gpu-micro-1": ray("one GPU, micro-batch 1", one_gpu(1), gpus=1),
    "1gpu-micro-4": ray("one GPU, micro-batch 4", one_gpu(4), gpus=1),
    "1gpu-micro-4-plain": plain("one GPU, micro-batch 4, without Ray", one_gpu(4), gpus=1),
    "4gpu-micro-4": ray("four workers, micro-batch 4", micro(4), gpus=4),
}

if __name__ == "__main__":
    measure("ray-train", CASES, __doc__)
