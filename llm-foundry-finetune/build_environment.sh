#!/usr/bin/env bash
# Build or update .venv-foundry from requirements.txt, if that is needed; launch.sh and `make test` call it. Several starts build
# it once: the other ones wait. The stamp `ready` is written last, so that an interrupted build is continued.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
environment=.venv-foundry requirements=llm-foundry-finetune/requirements.txt
built_from=$(cat "$requirements" llm-foundry-finetune/build_environment.sh | sha256sum)
is_ready() { [[ -f $environment/ready && $(<"$environment/ready") == "$built_from" ]]; }
if is_ready; then exit 0; fi
mkdir -p "$environment"
exec 9>"$environment/lock"
if ! flock --nonblock 9; then
    echo "waiting for another start, which builds $environment ..." >&2
    flock 9
fi
if is_ready; then exit 0; fi

for python in ${PYTHON:-} python3.11 python3.12 python3; do
    if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then break; fi
    python=
done
if [[ -z $python ]]; then
    echo "error: LLM Foundry needs Python 3.11 or 3.12, and there is none on the PATH: install one, or name it in PYTHON" >&2
    exit 2
fi
log=$environment/build.log
echo "Building $environment: LLM Foundry and torch 2.7, 7 GB, a few minutes (log: $log) ..." >&2
(
    if [[ ! -x $environment/bin/pip ]]; then launchers/new_environment.sh "$python" "$environment"; fi
    # --no-compile: some packages have thousands of modules that are never imported, and Python compiles the rest on first use.
    "$environment/bin/python" -m pip install --disable-pip-version-check --progress-bar off --no-compile -r "$requirements"
    without_dependencies=$(sed -n 's/^# --no-deps \([^ ]*\).*/\1/p' "$requirements")
    # shellcheck disable=SC2086 # one argument per package
    "$environment/bin/python" -m pip install --disable-pip-version-check --progress-bar off --no-deps ${without_dependencies:-pip}
) >"$log" 2>&1 9>&- &
build=$!
trap 'kill $build 2>/dev/null || true' EXIT
for ((seconds = 0; ; seconds += 1)); do
    sleep 1
    if ! kill -0 $build 2>/dev/null; then break; fi
    if [[ -t 2 ]] || ((seconds % 30 == 29)); then # one line that changes on a screen, a line now and then in a log
        last=$(grep -E '^(Collecting|  Downloading|Installing)' "$log" | tail -n 1 | cut -c 1-70 || true)
        if [[ -t 2 ]]; then printf '\r\033[K  %d s  %s' "$seconds" "$last" >&2; else echo "  $seconds s  $last" >&2; fi
    fi
done
if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
if ! wait $build; then
    reason=$(grep -E '^(ERROR|Error|.*: error|.*[Nn]o space left)' "$log" | tail -n 1 || true)
    echo "error: $environment could not be built: ${reason:-$(tail -n 1 "$log")} (all of it: $log)" >&2
    exit 2
fi
# `common` is found by whatever is started with this environment's Python, not by launch.sh alone.
echo "$PWD" >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/repository.pth"
echo "$built_from" >"$environment/ready"
