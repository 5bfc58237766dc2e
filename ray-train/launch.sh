#!/usr/bin/env bash
# Fine-tune with Ray Train and DeepSpeed ZeRO-3: a worker on each GPU of the cluster, or two on the CPU if there is none.
#
#   ray-train/launch.sh [--config FILE] [key=value ...]                    # Ray is started, and stopped at the end
#   RAY_ADDRESS=10.0.0.1:6379 ray-train/launch.sh ...                      # in a cluster started with `ray start`
#   NPROC_PER_NODE=1 ray-train/launch.sh ...                               # another number of workers: as ray.workers=1
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # after `sh launch.sh`
set -euo pipefail
folder=$(dirname "$(readlink -f "$0")") # a link may have started this
also_needed="ray deepspeed"
source "$folder/../launchers/environment.sh"
if ! command -v nvidia-smi >/dev/null; then export DS_ACCELERATOR=cpu; fi # or DeepSpeed warns that it found no GPU
exec python "$folder/train.py" ${NPROC_PER_NODE:+ray.workers=$NPROC_PER_NODE} "$@"
