"""Base model against fine-tuned model on the held-out rows: loss, perplexity, token accuracy, bits per byte, samples.

Train first; then, with the same `--config` and settings as the training (or those in its folder,
`--config RUN/config.yaml`):

    python pytorch-fsdp/eval.py --config smoke.yaml                       # one process, CPU or GPU
    torchrun --nproc_per_node 2 pytorch-fsdp/eval.py                      # several: the same figures, sooner
    python pytorch-fsdp/eval.py eval.model=facebook/opt-1.3b             # any other model instead of output_dir/model

Writes eval.json, samples.md and plots/eval.png into the run folder.
"""

import sys
from pathlib import Path

# The project's modules and `common`: if this package is not installed, or Python leaves the folder out (-P).
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

try:
    from settings import PROJECT, Config

    from common.config import check_command_line, parse_config

    if __name__ == "__main__":
        check_command_line(Config, __file__)  # before torch is imported, which takes seconds

    from common.comparison import compare
    from common.errors import run
except ModuleNotFoundError as error:  # another Python than launch.sh's
    from launchers.start_again import start_again

    start_again(error)


def main() -> None:
    compare(parse_config(Config, __file__), project=PROJECT)


if __name__ == "__main__":
    run(main)
