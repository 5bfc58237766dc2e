#!/usr/bin/env bash
# Make a virtual environment with pip in it:  launchers/new_environment.sh PYTHON FOLDER
#
# Some Pythons come without `ensurepip`, which puts pip there: Debian's without python3-venv, Kaggle's, Colab's.
set -euo pipefail
python=$1 folder=$2
unset PYTHONPATH # the new environment's pip is installed, whatever else can be imported
has_pip() { "$folder/bin/python" -m pip --version >/dev/null 2>&1; }

if "$python" -c 'import ensurepip' 2>/dev/null && "$python" -m venv "$folder" && has_pip; then exit 0; fi
if command -v uv >/dev/null && uv venv --quiet --seed --allow-existing --python "$(command -v "$python")" "$folder" && has_pip; then
    exit 0
fi
if "$python" -m pip --version >/dev/null 2>&1 && "$python" -m venv --without-pip "$folder" &&
    "$python" -m pip --python "$folder/bin/python" install --quiet --disable-pip-version-check pip && has_pip; then
    exit 0
fi
echo "error: $python cannot make the virtual environment $folder: it has neither ensurepip nor pip of its own, and uv did" \
    "not help. Install uv, or on Debian and Ubuntu: apt-get install python3-venv" >&2
exit 2
