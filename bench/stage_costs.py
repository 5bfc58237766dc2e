"""What the layers of a pipeline take on this GPU, by micro-batch, and the stages that follow from it.

    python bench/as_t4.py bench/stage_costs.py results/deepspeed-pipeline/stage-costs.json model.name=FOLDER \\
        model.random_weights=true train.precision=fp16

The keys are those of deepspeed-pipeline/config.yaml. What is timed is what a run with `pipeline.partition=measured`
times at its start, in one process.
"""

import datetime
import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "deepspeed-pipeline")]

import torch.distributed as dist  # noqa: E402
from partition import computed_costs, deal_out, measured_costs  # noqa: E402
from train import Config, setup_distributed  # noqa: E402

from common import models, runtime  # noqa: E402
from common.config import parse_config  # noqa: E402

ROWS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    record, settings = Path(sys.argv[1]), sys.argv[2:]
    cfg = parse_config(Config, REPOSITORY / "deepspeed-pipeline/train.py", settings)
    _, _, device = setup_distributed(cfg)
    dtype, reason = runtime.resolve_precision(cfg.train.precision, device)
    shape = models.load_model_config(cfg.model)
    computed = computed_costs(shape, cfg.data.max_length, cfg.train.activation_checkpointing)
    cases = []
    for rows in (ROWS[0], *ROWS):  # the first also warms up, and is left out
        cfg.train.micro_batch_size = rows
        costs = measured_costs(cfg, device, dtype)
        layers = {stages: deal_out(shape.num_hidden_layers, stages, costs) for stages in (2, 4)}
        cases.append({"rows": rows, "milliseconds": {k: 1e3 * v for k, v in costs._asdict().items()}, "layers": layers})
        print(cases[-1], flush=True)
    found = {
        "date": datetime.date.today().isoformat(),
        "environment": runtime.describe_environment(1, reason),
        "model": models.architecture(shape),
        "settings": {"data.max_length": cfg.data.max_length, "train.precision": cfg.train.precision},
        "checkpointing": cfg.train.activation_checkpointing,
        "computed_head_layers": computed.head / computed.layer,
        "cases": cases[1:],
    }
    record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
