#!/usr/bin/env bash
# Fine-tune with DDP: one process for each GPU found, or two on the CPU where there is none.
#
#   pytorch-ddp/launch.sh [--config FILE] [key=value ...]
#   NPROC_PER_NODE=1 pytorch-ddp/launch.sh ...                                   # another number of processes
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 pytorch-ddp/launch.sh ...          # on each of two machines
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
source "$folder/../common/environment.sh"

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(python -c 'import torch; print(torch.cuda.device_count())'); fi
processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}
if ((gpus == 0)); then # PyTorch's threads: share the cores out
    cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 1 ? cores / processes : 1))}
fi

if [[ -n ${NNODES:-} ]]; then
    rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK: 0 on the first machine, 1 on the next ...}"
        --master_addr "${MASTER_ADDR:?set MASTER_ADDR: the first machine\'s address}" --master_port "${MASTER_PORT:-29500}")
else
    rendezvous=(--standalone) # one machine, any free port
fi
exec python -m common.torchrun "${rendezvous[@]}" --nproc_per_node "$processes" "$folder/train.py" "$@"
