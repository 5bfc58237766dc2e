"""Measure deepspeed-pipeline on this machine's GPUs and write a record of each case to results/deepspeed-pipeline/.

python bench/pipeline.py                                     # the model and data of config.yaml, from the Hub
python bench/pipeline.py --model FOLDER --text FILE.jsonl    # without the Hub: real shapes (bench/real_shapes.py)
python bench/pipeline.py --only 2-stages-micro-16            # this case, or cases whose names begin so
python bench/pipeline.py --shares 8 --set train.max_steps=8  # on one GPU: each stage has an eighth of it

A record holds what each stage computes and its peak of memory next to the run's speed (bench/stage_times.py). From that
comes the efficiency: what the slowest stage computes in a step, divided by the time of the step. Ideal are m of
m + p - 1 slots, for m micro-batches and p stages.
"""

from functools import partial

from cases import Case, measure

T4 = ["train.precision=fp16", "runtime.gpu_memory_limit_gib=14.7", "train.max_steps=20", "data.eval_rows=64",
      "data.train_rows=0", "data.max_length=512"]  # fmt: skip
# Twice config.yaml's: even an eighth of an H200 is quicker than a T4, and what the stages exchange takes as long.
ROWS = 4

pipeline = partial(Case, as_t4=True, launcher="deepspeed", through="bench/stage_times.py")


def batch(micro_batches: int, rows: int = ROWS) -> list[str]:
    return [*T4, f"train.micro_batch_size={rows}", f"train.global_batch_size={rows * micro_batches}"]


CASES = {
    "shipped": pipeline("16 micro-batches of 2 rows, as shipped", batch(16, rows=2)),
    "shipped-computed": pipeline(
        "16 micro-batches of 2 rows, partition by operations", [*batch(16, rows=2), "pipeline.partition=computed"]
    ),
    **{f"2-stages-micro-{m}": pipeline(f"{m} micro-batches of {ROWS} rows", batch(m)) for m in (2, 4, 8, 16, 32)},
    "2-stages-computed": pipeline(
        f"16 micro-batches of {ROWS} rows, partition by operations", [*batch(16), "pipeline.partition=computed"]
    ),
    "4-stages": pipeline(f"four stages, 16 micro-batches of {ROWS} rows", batch(16), gpus=4),
}


def efficiency(record: dict) -> dict:
    """The slowest stage's own compute in a step ÷ the step, next to the ideal; and how unlike the stages are."""
    grid = record["environment"]["pipeline"]
    p, m = len(grid["layers_by_stage"]), grid["micro_batches"]
    stages = [record[f"stage-times-{rank}"] for rank in range(record["gpus"])]
    busy = [stage["forward"] + stage["backward"] for stage in stages]
    step = record["last_steps"][0]["tokens"] / record["summary"]["tokens_per_second"]  # blocks: all steps are alike
    return {
        "ideal": round(m / (m + p - 1), 4),
        "efficiency": round(m * max(busy) / step, 4),
        "slowest_to_fastest": round(max(busy) / min(busy), 4),
    }


if __name__ == "__main__":
    measure("deepspeed-pipeline", CASES, __doc__, efficiency)
