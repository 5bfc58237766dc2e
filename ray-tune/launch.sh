#!/usr/bin/env bash
# Search hyper-parameters: one trial at a time on each GPU found, or two on the CPU if there is none.
#
#   ray-tune/launch.sh [--config FILE] [key=value ...]
#   RAY_ADDRESS=10.0.0.1:6379 ray-tune/launch.sh ...          # on a Ray cluster that is there already
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # after `sh launch.sh`
set -euo pipefail
folder=$(dirname "$(readlink -f "$0")") # a link may have started this
also_needed="ray optuna"
source "$folder/../launchers/environment.sh"
exec python "$folder/train.py" "$@"
