"""Measure pytorch-fsdp on this machine's GPUs and write a record of each case to results/pytorch-fsdp/.

    python bench/fsdp.py                                     # the model and data of config.yaml, from the Hub
    python bench/fsdp.py --model FOLDER --text FILE.jsonl    # without the Hub: real shapes (bench/real_shapes.py)
    python bench/fsdp.py --only memory speed-2gpu            # cases whose names begin so

Cases of pytorch-ddp are among them: the same model with the same settings, for comparison.
"""

from cases import Case, measure

# OPT-1.3B: what the arithmetic of a memory record needs.
LAYERS, WIDTH, FFN, VOCABULARY = 24, 2048, 8192, 50272
PARAMETERS, ROOT_PARAMETERS = 1_315_758_080, 107_159_552  # the root's group: embeddings and the last norm

COMMON = ["data.max_length=1024", "data.eval_rows=64", "data.train_rows=0"]
SPEED = [*COMMON, "train.global_batch_size=128", "train.micro_batch_size=32", "train.max_steps=20",
         "train.precision=bf16", "train.compile=true", "train.activation_checkpointing=false"]  # fmt: skip
T4 = [*COMMON, "train.precision=fp16", "runtime.gpu_memory_limit_gib=14.7", "train.global_batch_size=16",
      "train.max_steps=12"]  # fmt: skip
CHECKPOINTED = [*T4, "train.activation_checkpointing=true"]
NO_P2P = {"NCCL_P2P_DISABLE": "1"}

CASES = {
    "speed-1gpu": Case("one GPU", SPEED, gpus=1),
    "speed-2gpu": Case("two GPUs, NVLink", SPEED),
    "speed-2gpu-ddp": Case("the same with DDP", SPEED, project="pytorch-ddp"),
    "speed-2gpu-trl": Case(
        "TRL's SFTTrainer, FSDP2", [*SPEED, "train.compile=false", "peer.fsdp=true"], project="bench/peers"
    ),
    "speed-2gpu-zero2": Case("`reshard_after_forward=false`", [*SPEED, "fsdp.reshard_after_forward=false"]),
    "speed-2gpu-no-p2p": Case("two GPUs, no peer access (through host memory)", SPEED, variables=NO_P2P),
    "speed-2gpu-no-p2p-no-sync": Case("the same, `no_sync=true`", [*SPEED, "fsdp.no_sync=true"], variables=NO_P2P),
    "speed-2gpu-no-p2p-ddp": Case("the same with DDP", SPEED, variables=NO_P2P, project="pytorch-ddp"),
    "memory-ddp": Case(
        "DDP, micro-batch 1",
        [*CHECKPOINTED, "train.micro_batch_size=1"],
        as_t4=True,
        beside_others=True,
        project="pytorch-ddp",
    ),
    "memory-micro-1-plain": Case(
        "micro-batch 1, without checkpointing",
        [*T4, "train.micro_batch_size=1", "train.activation_checkpointing=false"],
        as_t4=True,
        beside_others=True,
    ),
    "memory-micro-1": Case(
        "micro-batch 1", [*CHECKPOINTED, "train.micro_batch_size=1"], as_t4=True, beside_others=True
    ),
    "memory-micro-4": Case(
        "micro-batch 4", [*CHECKPOINTED, "train.micro_batch_size=4"], as_t4=True, beside_others=True
    ),
    "memory-micro-8": Case(
        "micro-batch 8", [*CHECKPOINTED, "train.micro_batch_size=8"], as_t4=True, beside_others=True
    ),
    "memory-micro-4-no-sync": Case(
        "micro-batch 4, `no_sync=true`",
        [*CHECKPOINTED, "train.micro_batch_size=4", "fsdp.no_sync=true"],
        as_t4=True,
        beside_others=True,
    ),
    "memory-offload": Case(
        "micro-batch 8, `cpu_offload=true`",
        [*CHECKPOINTED, "train.micro_batch_size=8", "fsdp.cpu_offload=true"],
        as_t4=True,
        beside_others=True,
    ),
}


def arithmetic(record: dict) -> dict:
    """What the tensors of one GPU should take under activation checkpointing, in GiB by term, next to what they took.

    Per rank, with b sequences of s tokens, width h, 2 bytes per number if no other is named:
    - state: 16 bytes per parameter (fp32 weight, gradient, two moments) / ranks;
    - gathered: the weights of the largest group, here the root's;
    - checkpoints: the input of each layer, layers × b × s × h;
    - one layer, recomputed: two norms, q, k, v, attention, two outputs, a sum (9 b × s × h), MLP (2 b × s × FFN);
    - loss: the head's gradient in fp32, vocabulary × h × 4 bytes, and the hidden states with their gradient.
    """
    settings = record["settings"]
    if record["project"] != "pytorch-fsdp" or settings.get("train.activation_checkpointing") != "true":
        return {}
    tokens = int(settings["train.micro_batch_size"]) * int(settings["data.max_length"])
    terms = {
        "state": 16 * PARAMETERS / record["gpus"],
        "gathered": 2 * ROOT_PARAMETERS,
        "checkpoints": 2 * LAYERS * tokens * WIDTH,
        "one layer": 2 * tokens * (9 * WIDTH + 2 * FFN),
        "loss": 4 * VOCABULARY * WIDTH + 2 * 2 * tokens * WIDTH,
    }
    gib = {name: round(size / 2**30, 3) for name, size in terms.items()}
    if settings.get("fsdp.cpu_offload") == "true":
        gib["state"] = 0.0  # in host memory
    total = round(sum(gib.values()), 3)
    peak = record["summary"]["peak_gpu_gib"]
    return {"arithmetic_gib": gib | {"sum": total, "measured": peak, "measured / sum": round(peak / total, 3)}}


if __name__ == "__main__":
    measure("pytorch-fsdp", CASES, __doc__, arithmetic)
