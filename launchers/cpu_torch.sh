#!/usr/bin/env bash
# On Linux without an NVIDIA GPU, install torch's CPU build:  launchers/cpu_torch.sh PYTHON REQUIREMENT [INDEX]
#
# PyPI's build for Linux brings CUDA's libraries along, several GB. PyTorch's own index has one without, and is asked in
# addition to what pip is configured to use. If it does not answer within seconds, nothing is installed here.
set -euo pipefail
python=$1 requirement=$2 index=${3:-https://download.pytorch.org/whl/cpu}
if [[ $(uname -s) != Linux || -e /dev/nvidiactl ]] || nvidia-smi -L >/dev/null 2>&1; then exit 0; fi
is_there='import sys; from importlib.metadata import version as v; sys.exit(v("torch").partition("+")[0] != sys.argv[1])'
if "$python" -c "$is_there" "${requirement#*==}" 2>/dev/null; then exit 0; fi

answers='import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=3)'
if timeout 5 "$python" -c "$answers" "$index" 2>/dev/null &&
    "$python" -m pip install --quiet --disable-pip-version-check --extra-index-url "$index" "$requirement"; then
    echo "There is no NVIDIA GPU: torch is the CPU build of $index"
else
    echo "There is no NVIDIA GPU, but $index gave no CPU build of torch: taking what pip finds, perhaps with several GB of CUDA"
fi
