"""Measure pytorch-ddp on this machine's GPUs and write a record of each case to results/pytorch-ddp/.

python bench/ddp.py                                     # the model and data of config.yaml, from the Hub
python bench/ddp.py --model FOLDER --text FILE.jsonl    # without the Hub: real shapes (bench/real_shapes.py)
python bench/ddp.py --only memory speed-2gpu            # cases whose names begin so
"""

from functools import partial

from cases import Case, measure

SPEED = ["data.max_length=1024", "train.global_batch_size=256", "train.micro_batch_size=32", "train.max_steps=20",
         "train.precision=bf16", "train.compile=true", "data.eval_rows=64", "data.train_rows=0"]  # fmt: skip
T4 = ["train.precision=fp16", "runtime.gpu_memory_limit_gib=14.7", "data.max_length=512", "train.global_batch_size=32",
      "data.eval_rows=64", "data.train_rows=0"]  # fmt: skip

LARGEST = ["train.global_batch_size=192", "train.micro_batch_size=48"]
NO_P2P = {"NCCL_P2P_DISABLE": "1"}

trl = partial(Case, project="bench/peers")

CASES = {
    "memory-micro-4": Case("micro-batch 4", [*T4, "train.micro_batch_size=4", "train.max_steps=100"], as_t4=True),
    "speed-1gpu": Case("one GPU", SPEED, gpus=1),
    "speed-2gpu": Case("two GPUs, NVLink", SPEED),
    "speed-2gpu-no-p2p": Case("two GPUs, no peer access (through host memory)", SPEED, variables=NO_P2P),
    "speed-2gpu-no-p2p-bf16": Case(
        "the same, gradients travel in bf16", [*SPEED, "ddp.gradient_compression=bf16"], variables=NO_P2P
    ),
    "speed-2gpu-eager": Case("two GPUs, NVLink, not compiled", [*SPEED, "train.compile=false"]),
    "speed-2gpu-trl": trl("TRL's SFTTrainer, Liger", [*SPEED, "train.compile=false", "peer.liger=true"]),
    "speed-2gpu-trl-48": trl("the same, micro-batch 48", [*SPEED, *LARGEST, "train.compile=false", "peer.liger=true"]),
    "speed-2gpu-trl-compile": trl("TRL's SFTTrainer, compiled", [*SPEED, "train.micro_batch_size=16"]),
    "memory-micro-8": Case("micro-batch 8", [*T4, "train.micro_batch_size=8", "train.max_steps=12"], as_t4=True),
    "memory-micro-16": Case("micro-batch 16", [*T4, "train.micro_batch_size=16", "train.max_steps=12"], as_t4=True),
    "memory-micro-16-checkpointing": Case(
        "micro-batch 16, activation checkpointing",
        [*T4, "train.micro_batch_size=16", "train.max_steps=12", "train.activation_checkpointing=true"],
        as_t4=True,
    ),
}

if __name__ == "__main__":
    measure("pytorch-ddp", CASES, __doc__)
