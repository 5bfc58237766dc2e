#!/usr/bin/env bash
# Fine-tune with FSDP: one process per GPU found, or two on the CPU if there is none.
#
#   pytorch-fsdp/launch.sh [--config FILE] [key=value ...]
#   NPROC_PER_NODE=1 pytorch-fsdp/launch.sh ...                                   # another number of processes
#   GPU_SHARES=2 pytorch-fsdp/launch.sh ...                                       # two processes on one GPU
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 pytorch-fsdp/launch.sh ...          # on each of two machines
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # after `sh launch.sh`
set -euo pipefail
folder=$(dirname "$(readlink -f "$0")") # a link may have started this
source "$folder/../launchers/torchrun.sh"
torchrun_script "$folder/train.py" "$@"
