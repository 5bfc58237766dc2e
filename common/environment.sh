# Sourced by every launch.sh: puts the Python environment on the PATH. An active virtual environment is used; else the
# repository's .venv; else the system's Python where it has what is needed (Kaggle); else .venv is built.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

missing_packages() { # prints what `python` lacks; finds packages without importing them
    python - <<'PYTHON' 2>/dev/null || echo python
from importlib.util import find_spec
print(*(name for name in ("torch", "transformers", "datasets", "accelerate", "omegaconf") if find_spec(name) is None))
PYTHON
}

if [[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
    if [[ -n $(missing_packages) ]]; then
        echo "error: the active environment lacks: $(missing_packages). Run 'pip install -e $repository' in it," \
            "or deactivate it to use the repository's .venv" >&2
        exit 2
    fi
elif [[ -x $repository/.venv/bin/python || -n $(missing_packages) ]]; then
    make --silent -C "$repository" .venv/ready
    PATH=$repository/.venv/bin:$PATH
fi
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} # `common`, also where the package is not installed
