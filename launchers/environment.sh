# Sourced by every launch.sh, which has set `folder`: puts the Python environment on the PATH. An active virtual
# environment is used; else the repository's .venv; else the system's Python if it has what is needed (Kaggle); else
# .venv is built. A project that needs more packages than all do names them in `also_needed`; one whose framework pins
# other versions has an environment of its own, whatever is active: `own_environment`, built by the script
# `build_own_environment`.
# shellcheck disable=SC2154 # set by the launch.sh
repository=$(dirname "$folder")
# What lies in the current folder is data: no module is imported from there, whatever its files are called. Python puts
# that folder first for `-m`, `-c` and `-`, by which launchers and libraries start processes; the project's own folder
# is then no longer put there either.
export PYTHONSAFEPATH=1

missing_packages() { # prints what `python` lacks; finds packages without importing them
    # shellcheck disable=SC2086 # one argument per package
    python - ${also_needed:-} <<'PYTHON' 2>/dev/null || echo python
import sys
from importlib.util import find_spec
names = ("torch", "transformers", "datasets", "accelerate", "omegaconf", "psutil", "matplotlib", "rouge_score")
print(*(name for name in (*names, *sys.argv[1:]) if find_spec(name) is None))
PYTHON
}

if [[ -n ${own_environment:-} ]]; then
    # shellcheck disable=SC2154 # set by the launch.sh
    "$build_own_environment"
    export VIRTUAL_ENV=$repository/$own_environment
    PATH=$VIRTUAL_ENV/bin:$PATH
elif missing=$(missing_packages) && [[ -z $missing && -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
    : # the active environment has everything
elif [[ -x $repository/.venv/bin/python || (-n $missing && -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-}) ]]; then
    make --silent -C "$repository" .venv/ready
    PATH=$repository/.venv/bin:$PATH
elif [[ -n $missing ]]; then
    echo "error: the active environment lacks: $missing. Run 'pip install -e \"${repository}[ddp,fsdp,deepspeed,ray]\"' in it, or" \
        "deactivate it: the repository's own .venv is then built and used" >&2
    exit 2
fi
# The project's own modules, and `common`, even if the package is not installed.
export PYTHONPATH=$folder:$repository${PYTHONPATH:+:$PYTHONPATH}
# When one process ends with an error, the C++ parts of the other ones print stack traces over its error line.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
