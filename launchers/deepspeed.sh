# Sourced by the launch.sh of the projects that the deepspeed launcher starts: one process per GPU found, or two on
# the CPU. NNODES, NODE_RANK and MASTER_ADDR start it on several machines.
also_needed=deepspeed
source "$(dirname "${BASH_SOURCE[0]}")/processes.sh"
if ((gpus == 0)); then export DS_ACCELERATOR=cpu; fi

deepspeed_script() { # SCRIPT [arguments]
    exec python -m launchers.deepspeed_launcher "$processes" "${share[@]}" "$@"
}
