"""Measure ray-tune on this machine's GPUs and write a record of each case to results/ray-tune/.

    python bench/ray_tune.py                                     # the model and data of config.yaml, from the Hub
    python bench/ray_tune.py --model FOLDER --text FILE.jsonl    # without the Hub: real shapes (bench/real_shapes.py)
    python bench/ray_tune.py --only asha                         # cases whose names begin so

The same nine trials with early stopping and without it, one a GPU, each GPU limited to what a T4 has. A record's
`summary.search` has the device seconds, how busy the devices were, and the best loss. The attention kernels are those
of this machine's GPU: bench/as_t4.py reaches only the process that it starts, and Ray starts the trials.
"""

from cases import Case, measure

TRIALS = [
    "train.precision=fp16",
    "runtime.gpu_memory_limit_gib=14.7",
    "data.max_length=256",
    "data.eval_split=",  # a file has one split: rows of it are held out
    "data.eval_rows=256",
    "train.learning_rate=2e-5",  # inside the space of config.yaml
    "train.max_steps=216",
    # As config.yaml, for fewer steps: rungs at 12, 48 and 192, behind the longest warm-up.
    "train.warmup_steps=12",
    "search.grace_period=12",
    "search.reduction_factor=4",
    "search.space.warmup_steps.choice=[0,6,12]",
    "eval.every=12",
    "checkpoint.every=72",
]
ASHA, NONE = "search.scheduler=asha", "search.scheduler=none"


def search(label: str, *settings: str, **options) -> Case:
    return Case(label, [*TRIALS, *settings], launcher="python", **options)


CASES = {
    "asha": search("nine trials, ASHA", ASHA, "search.trials=9"),
    "none": search("the same trials, no early stopping", NONE, "search.trials=9"),
    "asha-6": search("six trials, ASHA", ASHA, "search.trials=6"),
    "half-gpu": search("nine trials, ASHA, two on each GPU", ASHA, "search.trials=9", "search.gpus_per_trial=0.5"),
    "1gpu-asha": search(
        "nine trials, ASHA, one GPU", ASHA, "search.trials=9", gpus=1, variables={"CUDA_VISIBLE_DEVICES": "0"}
    ),
}

if __name__ == "__main__":
    measure("ray-tune", CASES, __doc__)
