# Sourced by the launch.sh of the projects that torchrun starts: one process per GPU found, or two on the CPU.
source "$(dirname "${BASH_SOURCE[0]}")/processes.sh"

torchrun_script() { # SCRIPT [arguments]: start it in `processes` processes here, and on NNODES machines if that is set
    local rendezvous
    if [[ ${NNODES:-1} != 1 ]]; then
        rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK: 0 on the first machine, 1 on the next ...}"
            --master_addr "${MASTER_ADDR:?set MASTER_ADDR: the first machine\'s address}" --master_port "${MASTER_PORT:-29500}")
    else
        rendezvous=(--standalone) # one machine, any free port
    fi
    exec python -m launchers.torchrun "${rendezvous[@]}" --nproc_per_node "$processes" "${share[@]}" "$@"
}
