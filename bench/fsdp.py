"""Measure pytorch-fsdp on this machine's GPUs and write a record of each case to results/pytorch-fsdp/.

    python bench/fsdp.py                                     # the model and data of config.yaml, from the Hub
    python bench/fsdp.py --model FOLDER --text FILE.jsonl    # without the Hub: real shapes (bench/real_shapes.py)
    python bench/fsdp.py --only memory speed-2gpu            # cases whose names begin so

Cases of pytorch-ddp are among them: the same model with the same settings, for comparison.
"""

from cases import Case, measure

COMMON = ["data.max_length=1024", "data.eval_rows=64", "data.train_rows=0"]
SPEED = [*COMMON, "train.global_batch_size=128", "train.micro_batch_size=32", "train.max_steps=12",
         "train.precision=bf16", "train.compile=true", "train.activation_checkpointing=false"]  # fmt: skip
T4 = [*COMMON, "train.precision=fp16", "runtime.gpu_memory_limit_gib=14.7", "train.global_batch_size=16",
      "train.max_steps=12"]  # fmt: skip
CHECKPOINTED = [*T4, "train.activation_checkpointing=true"]
NO_P2P = {"NCCL_P2P_DISABLE": "1"}

CASES = {
    "speed-1gpu": Case("one GPU", SPEED, gpus=1),
    "speed-2gpu": Case("two GPUs, NVLink", SPEED),
    "speed-2gpu-ddp": Case("the same with DDP", SPEED, project="pytorch-ddp"),
    "speed-2gpu-zero2": Case("`reshard_after_forward=false`", [*SPEED, "fsdp.reshard_after_forward=false"]),
    "speed-2gpu-no-p2p": Case("two GPUs, no peer access (through host memory)", SPEED, variables=NO_P2P),
    "speed-2gpu-no-p2p-no-sync": Case("the same, `no_sync=true`", [*SPEED, "fsdp.no_sync=true"], variables=NO_P2P),
    "speed-2gpu-no-p2p-ddp": Case("the same with DDP", SPEED, variables=NO_P2P, project="pytorch-ddp"),
    "memory-ddp": Case(
        "DDP, micro-batch 1", [*CHECKPOINTED, "train.micro_batch_size=1"], as_t4=True, project="pytorch-ddp"
    ),
    "memory-micro-1-plain": Case(
        "micro-batch 1, without checkpointing",
        [*T4, "train.micro_batch_size=1", "train.activation_checkpointing=false"],
        as_t4=True,
    ),
    "memory-micro-1": Case("micro-batch 1", [*CHECKPOINTED, "train.micro_batch_size=1"], as_t4=True),
    "memory-micro-4": Case("micro-batch 4", [*CHECKPOINTED, "train.micro_batch_size=4"], as_t4=True),
    "memory-micro-8": Case("micro-batch 8", [*CHECKPOINTED, "train.micro_batch_size=8"], as_t4=True),
    "memory-micro-4-no-sync": Case(
        "micro-batch 4, `no_sync=true`", [*CHECKPOINTED, "train.micro_batch_size=4", "fsdp.no_sync=true"], as_t4=True
    ),
    "memory-offload": Case(
        "micro-batch 8, `cpu_offload=true`",
        [*CHECKPOINTED, "train.micro_batch_size=8", "fsdp.cpu_offload=true"],
        as_t4=True,
    ),
}

if __name__ == "__main__":
    measure("pytorch-fsdp", CASES, __doc__)
