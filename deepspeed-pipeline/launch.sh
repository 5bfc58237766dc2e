#!/usr/bin/env bash
# Fine-tune with a DeepSpeed pipeline: one stage on each GPU found, or two stages on the CPU if there is none.
#
#   deepspeed-pipeline/launch.sh [--config FILE] [key=value ...]
#   NPROC_PER_NODE=4 deepspeed-pipeline/launch.sh pipeline.stages=2               # two pipelines of two stages
#   GPU_SHARES=2 deepspeed-pipeline/launch.sh ...                                 # two stages on one GPU
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 deepspeed-pipeline/launch.sh ...     # on each of two machines
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # after `sh launch.sh`
set -euo pipefail
folder=$(dirname "$(readlink -f "$0")") # a link may have started this
source "$folder/../launchers/deepspeed.sh"
deepspeed_script "$folder/train.py" "$@"
