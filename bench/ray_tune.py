"""Measure ray-tune on this machine's GPUs and write a record of each case to results/ray-tune/.

    python bench/ray_tune.py                                     # the model and data of config.yaml, from the Hub
    python bench/ray_tune.py --model FOLDER --text FILE.jsonl    # without the Hub: real shapes (bench/real_shapes.py)
    python bench/ray_tune.py --only asha                         # cases whose names begin so

The same six trials with early stopping and without it, one a GPU, each GPU limited to what a T4 has. A record's
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
    "train.warmup_steps=25",
    "search.grace_period=24",
    "search.reduction_factor=3",
    "search.space.warmup_steps.choice=[0,12,25]",
    "search.trials=6",
    "eval.every=24",
    "checkpoint.every=72",
]

CASES = {
    "asha": Case("six trials, ASHA", [*TRIALS, "search.scheduler=asha"], launcher="python"),
    "none": Case("the same trials, no early stopping", [*TRIALS, "search.scheduler=none"], launcher="python"),
    "asha-1gpu": Case(
        "six trials, ASHA, one GPU",
        [*TRIALS, "search.scheduler=asha"],
        gpus=1,
        launcher="python",
        variables={"CUDA_VISIBLE_DEVICES": "0"},
    ),
    "half-gpu": Case(
        "six trials, ASHA, two on each GPU",
        [*TRIALS, "search.scheduler=asha", "search.gpus_per_trial=0.5"],
        launcher="python",
    ),
}

if __name__ == "__main__":
    measure("ray-tune", CASES, __doc__)
