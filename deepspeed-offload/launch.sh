#!/usr/bin/env bash
# Fine-tune with DeepSpeed's ZeRO-2 offload: on one GPU, or with two processes on the CPU if there is none.
#
#   deepspeed-offload/launch.sh [--config FILE] [key=value ...]
#   NPROC_PER_NODE=2 deepspeed-offload/launch.sh ...                              # another number of processes
#   GPU_SHARES=2 deepspeed-offload/launch.sh ...                                  # two processes on one GPU
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 deepspeed-offload/launch.sh ...     # on each of two machines
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # after `sh launch.sh`
set -euo pipefail
folder=$(dirname "$(readlink -f "$0")") # a link may have started this
source "$folder/../launchers/deepspeed.sh"
if ((gpus > 0)); then processes=${NPROC_PER_NODE:-${GPU_SHARES:-1}}; fi # the point of offload: one GPU will do
deepspeed_script "$folder/train.py" "$@"
