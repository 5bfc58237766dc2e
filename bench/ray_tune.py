"""Measure ray-tune on this machine's GPUs and write a record of each case to results/ray-tune/.

    python bench/ray_tune.py                                     # the model and data of config.yaml, from the Hub
    python bench/ray_tune.py --model FOLDER --text FILE.jsonl    # without the Hub: real shapes (bench/real_shapes.py)
    python bench/ray_tune.py --only asha                         # cases whose names begin so

The same trials with early stopping and without it, one per GPU, each GPU limited to what a T4 has. A record's
`summary.search` has the device seconds of training, how busy the devices were, and the best loss. The attention
kernels are those of this machine's GPU: bench/as_t4.py reaches only the process that it starts, and Ray starts the
trials.
"""

from cases import Case, measure

TRIALS = [
    "train.precision=fp16",
    "runtime.gpu_memory_limit_gib=14.7",
    "data.max_length=256",
    "data.eval_split=",  # a file has one split: rows of it are held out
    "data.eval_rows=128",
    "eval.batch_size=32",
    "train.learning_rate=2e-5",  # inside the space of config.yaml
    "train.max_steps=216",
    # As config.yaml, for fewer steps: rungs at 12, 48 and 192, after the longest warm-up.
    "train.warmup_steps=12",
    "search.grace_period=12",
    "search.reduction_factor=4",
    "search.space.warmup_steps.choice=[0,6,12]",
    # Larger than config.yaml's, which on an H200 would take the CPU's time for launching kernels, 32 times a step.
    "search.space.micro_batch_size.choice=[16,32]",
    "train.micro_batch_size=32",
    "train.activation_checkpointing=true",
    "eval.every=12",
    "checkpoint.every=108",
]
ASHA, NONE = "search.scheduler=asha", "search.scheduler=none"
SIX, NINE, SIXTEEN = "search.trials=6", "search.trials=9", "search.trials=16"
HALF = "search.gpus_per_trial=0.5"


def search(label: str, *settings: str, gpus: int = 2) -> Case:
    variables = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    return Case(label, [*TRIALS, *settings], gpus=gpus, launcher="python", variables=variables)


CASES = {
    "asha": search("nine trials, ASHA", ASHA, NINE),
    "none": search("the same trials, no early stopping", NONE, NINE),
    "sixteen-asha": search("sixteen trials, ASHA", ASHA, SIXTEEN),
    "sixteen-none": search("the same trials, no early stopping", NONE, SIXTEEN),
    "six-asha": search("six trials, ASHA", ASHA, SIX),
    "1gpu-asha": search("nine trials, two at a time on one GPU, ASHA", ASHA, NINE, HALF, gpus=1),
    "1gpu-none": search("the same trials, no early stopping", NONE, NINE, HALF, gpus=1),
    "1gpu-six-asha": search("six trials, two at a time on one GPU, ASHA", ASHA, SIX, HALF, gpus=1),
}

if __name__ == "__main__":
    measure("ray-tune", CASES, __doc__)
