# Sourced by every launch.sh: the Python environment, and `gpus` and `processes` of this machine.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(python -c 'import torch; print(torch.cuda.device_count())'); fi
processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}
if ((gpus == 0)); then # PyTorch's threads: share the cores out
    cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 1 ? cores / processes : 1))}
fi
