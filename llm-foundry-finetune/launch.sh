#!/usr/bin/env bash
# Fine-tune with LLM Foundry: one process per GPU found, or two on the CPU if there is none. The first start
# builds the environment that LLM Foundry needs, .venv-foundry: 7 GB, a few minutes.
#
#   llm-foundry-finetune/launch.sh [--config FILE] [key=value ...]
#   NPROC_PER_NODE=1 llm-foundry-finetune/launch.sh ...                                  # another number of processes
#   GPU_SHARES=2 llm-foundry-finetune/launch.sh ...                                      # two processes on one GPU
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 llm-foundry-finetune/launch.sh ...         # on each of two machines
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # after `sh launch.sh`
set -euo pipefail
folder=$(dirname "$(readlink -f "$0")") # a link may have started this
own_environment=.venv-foundry # LLM Foundry pins older versions of what the other projects use
build_own_environment=$folder/build_environment.sh
source "$folder/../launchers/processes.sh"
rendezvous=()
if [[ ${NNODES:-1} != 1 ]]; then
    rendezvous=(--world_size $((NNODES * processes)) --master_port "${MASTER_PORT:-29500}"
        --node_rank "${NODE_RANK:?set NODE_RANK: 0 on the first machine, 1 on the next ...}"
        --master_addr "${MASTER_ADDR:?set MASTER_ADDR: the first machine\'s address}")
fi
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore} # dozens of libraries warn of their own insides
exec python "$folder/composer_launcher.py" -n "$processes" "${rendezvous[@]}" "${share[@]}" "$folder/train.py" "$@"
