"""Measure llm-foundry-finetune on this machine's GPUs and write a record of each case to results/llm-foundry-finetune/.

    python bench/foundry.py                                     # the model and data of config.yaml, from the Hub
    python bench/foundry.py --model FOLDER --text FILE.jsonl    # without the Hub: real shapes, prompts and responses
    python bench/foundry.py --only memory                       # cases whose names begin so

Needs .venv-foundry (`make .venv-foundry/ready`). FILE.jsonl has the columns `prompt` and `response`, such as GSM8K's.
Cases of pytorch-fsdp are among them: the same model with the same settings, for comparison.
"""

import sys
from functools import partial

from cases import Case, measure

ROWS = 6  # packed into a sequence of 1,024 tokens, on average: GSM8K's rows have about 156
COMMON = ["data.max_length=1024", "data.eval_rows=64", "data.train_rows=0", "train.max_steps=20",
          "train.activation_checkpointing=true"]  # fmt: skip
if "--text" in sys.argv:  # config.yaml's columns are Dolly's
    COMMON += ["data.prompt_column=prompt", "data.response_column=response", "data.prompt_template={prompt}\n"]
T4 = [*COMMON, "train.precision=fp16", "runtime.gpu_memory_limit_gib=14.7", "train.global_batch_size=16"]
SPEED = [*COMMON, "train.precision=bf16", "train.global_batch_size=128", "train.micro_batch_size=8"]
PROFILE = "bench/step_profile.py"
PACKED = f"foundry.packing_ratio={ROWS}"
# pytorch-fsdp cuts the same rows into full blocks; its config.yaml is for texts.
FSDP = ["data.format=prompt-response", "data.packing=wrapped"]

foundry = partial(Case, launcher="composer")
fsdp = partial(Case, project="pytorch-fsdp")

CASES = {
    "memory-micro-1": foundry(
        "micro-batch 1, packed", [*T4, PACKED, "train.micro_batch_size=1"], as_t4=True, beside_others=True
    ),
    "memory-micro-2": foundry(
        "micro-batch 2, packed", [*T4, PACKED, "train.micro_batch_size=2"], as_t4=True, beside_others=True
    ),
    "memory-micro-4": foundry(
        "micro-batch 4, packed", [*T4, PACKED, "train.micro_batch_size=4"], as_t4=True, beside_others=True
    ),
    "speed-t4-settings": foundry(
        "LLM Foundry, fp16, micro-batch 1, packed", [*T4, PACKED, "train.micro_batch_size=1"], as_t4=True
    ),
    "speed-t4-settings-fsdp": fsdp("`pytorch-fsdp`, full blocks", [*T4, *FSDP, "train.micro_batch_size=1"], as_t4=True),
    # Where a step of these two goes. LLM Foundry leaves gathering ahead to FSDP2, as prefetch=0 does.
    "profile": foundry("LLM Foundry", [*T4, PACKED, "train.micro_batch_size=1"], as_t4=True, through=PROFILE),
    "profile-fsdp": fsdp("`pytorch-fsdp`", [*T4, *FSDP, "train.micro_batch_size=1"], as_t4=True, through=PROFILE),
    "profile-fsdp-no-prefetch": fsdp(
        "`pytorch-fsdp`, fsdp.prefetch=0",
        [*T4, *FSDP, "train.micro_batch_size=1", "fsdp.prefetch=0"],
        as_t4=True,
        through=PROFILE,
    ),
    "speed-2gpu": foundry("LLM Foundry, bf16, micro-batch 8, packed", [*SPEED, PACKED]),
    "speed-2gpu-padded": foundry("the same, one row per sequence", SPEED),
    "speed-2gpu-fsdp": fsdp("`pytorch-fsdp`, bf16, micro-batch 8, full blocks", [*SPEED, *FSDP]),
    "speed-1gpu": foundry("LLM Foundry, one GPU (DDP's path, no FSDP)", [*SPEED, PACKED], gpus=1),
    "speed-1gpu-fsdp": fsdp("`pytorch-fsdp`, one GPU", [*SPEED, *FSDP], gpus=1),
}

if __name__ == "__main__":
    measure("llm-foundry-finetune", CASES, __doc__)
