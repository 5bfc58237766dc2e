"""DeepSpeed's buffers in host memory, made no larger than they must be.

DeepSpeed 0.19.8 (`deepspeed/runtime/zero/stage_1_and_2.py`) keeps for each group of parameters: fp32 masters, fp32
gradients, and a 16-bit buffer through which the new weights return to the GPU. Adam adds two moments. Three things are
more than is needed, and no setting changes them:

- Page-locked memory comes from PyTorch's allocator, which rounds every buffer up to a power of two. `page_lock` locks
  the buffers where they are.
- Every group has a 16-bit buffer of its own, though one group at a time uses it. `share_staging` leaves one.
- After the last step the moments only wait for the end of the process. `drop_moments` frees them before the export.
"""

from __future__ import annotations

import contextlib
import sys

import torch


def share_staging(zero) -> None:
    """Let all groups send their weights to the GPU through one buffer: 2 bytes a parameter of host memory less.

    AdamW works on a group while the weights of the group before still travel; then they are waited for, as the next
    ones take their place. `zero` is DeepSpeed's optimizer.
    """
    buffers = zero.param_buffer_of_bit16_for_cpu_offload_groups
    shared = max(buffers, key=len)
    zero.param_buffer_of_bit16_for_cpu_offload_groups = [shared[: len(buffer)] for buffer in buffers]
    optimizer_step = zero._optimizer_step

    def step_then_wait(group: int) -> None:
        optimizer_step(group)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    zero._optimizer_step = step_then_wait


def page_lock(zero) -> None:
    """Page-lock what the GPU reads and writes: gradients and the buffer of `share_staging`.

    A copy between locked memory and the GPU runs by itself while both compute; one from ordinary memory goes through a
    small buffer of the driver's, and the GPU waits. Where the system refuses, a warning says what that costs.
    """
    buffers = [masters.grad for masters in zero.single_partition_of_fp32_groups]
    buffers.append(max(zero.param_buffer_of_bit16_for_cpu_offload_groups, key=len))
    for buffer in buffers:
        if buffer.is_pinned():  # by DeepSpeed, as ds_config.json says
            continue
        if status := int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)):
            print(
                f"warning: {buffer.nbytes / 2**20:,.0f} MiB of host memory cannot be page-locked (CUDA error "
                f"{status}): copies to and from the GPU are slow, and a step may take twice as long or more",
                file=sys.stderr,
            )
            with contextlib.suppress(RuntimeError):  # CUDA reports the refused call once more, at the next kernel
                torch.zeros(1, device="cuda")
            return


def drop_moments(zero) -> None:
    """Free Adam's moments, 8 bytes a parameter. No step can follow."""
    zero.optimizer.state.clear()
    for group in zero.bit16_groups:
        for parameter in group:
            if parameter._hp_mapping is not None:
                parameter._hp_mapping.optim_fragment = None
