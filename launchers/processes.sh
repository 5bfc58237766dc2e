# Sourced by the launch.sh of all projects but Ray's: the Python environment, `gpus` and `processes` of this machine, and
# `share`, what stands before the script if GPU_SHARES processes share a GPU.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

whole_number() { # NAME DESCRIPTION: exits with an error if the variable NAME is set, but not to a number from 1 to 99
    if [[ -n ${!1:-} && ! ${!1} =~ ^[1-9][0-9]?$ ]]; then
        echo "error: $1=${!1}: set it to $2, such as 2" >&2
        exit 2
    fi
}
whole_number GPU_SHARES "how many processes share a GPU"
whole_number NPROC_PER_NODE "how many processes to start on this machine"

# Wrong settings are reported once, before anything is started.
case " $* " in *" --help "* | *" -h "* | *" --check "*) exec python "$folder/train.py" "$@" ;; esac
python "$folder/train.py" --check "$@"

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(python -c 'import torch; print(torch.cuda.device_count())'); fi
share=()
if ((gpus > 0)) && [[ -n ${GPU_SHARES:-} ]]; then share=("$repository/launchers/gpu_share.py"); fi
processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus * ${GPU_SHARES:-1} : 2))}
if ((gpus == 0)); then # PyTorch's threads: share the cores out
    cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 1 ? cores / processes : 1))}
fi
