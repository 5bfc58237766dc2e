"""Base model against fine-tuned model on the held-out rows: loss, perplexity, token accuracy, bits per byte, samples.

Train first; then, with the same `--config` and settings as the training (or those in its folder,
`--config RUN/config.yaml`):

    python deepspeed-offload/eval.py --config smoke.yaml                           # one process, CPU or GPU
    torchrun --nproc_per_node 2 deepspeed-offload/eval.py                          # several: the same figures, sooner
    python deepspeed-offload/eval.py eval.model=meta-llama/Llama-3.2-1B-Instruct   # any other than output_dir/model

Writes eval.json, samples.md and plots/eval.png into the run folder.
"""

import sys
from pathlib import Path

# What stands next to it: if this repository is not installed, or Python leaves the folder out (-P).
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from launchers.evaluation import evaluate  # noqa: E402

if __name__ == "__main__":
    evaluate(__file__)
