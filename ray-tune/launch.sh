#!/usr/bin/env bash
# Search hyper-parameters: one trial at a time on each GPU found, or two on the CPU where there is none.
#
#   ray-tune/launch.sh [--config FILE] [key=value ...]
#   RAY_ADDRESS=10.0.0.1:6379 ray-tune/launch.sh ...          # on a Ray cluster that is there already
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
also_needed="ray optuna"
source "$folder/../common/environment.sh"
exec python "$folder/train.py" "$@"
