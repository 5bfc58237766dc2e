"""DeepSpeed's buffers in host memory, made no larger than they must be.

DeepSpeed 0.19.8 (`deepspeed/runtime/zero/stage_1_and_2.py`) keeps for each group of parameters: fp32 masters, fp32
gradients, and a buffer in the weights' type through which the new weights return to the GPU. Adam adds two moments.
More is there than is needed, and no setting changes that:

- A gradient comes from the GPU in the weights' type, and the new weights go back in it, never both at a time.
  `share_buffers` lets one buffer serve both, and widens to fp32 only the slice that AdamW is at.
- Page-locked memory comes from PyTorch's allocator, which rounds every buffer up to a power of two. `page_lock` locks
  the buffers in place.
- After the last step the moments only wait for the end of the process. `drop_moments` frees them before the export.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.optim.adamw import adamw

SLICE = 2**21  # parameters: all that AdamW reads and writes of them fits a CPU's cache, 36 MiB


def share_buffers(zero) -> None:
    """Keep the gradients where the new weights will be: 4 bytes per parameter of host memory less.

    With several micro-batches per step, the sum so far lies there too, and not in buffers of its own (2 bytes more).
    `zero` is DeepSpeed's optimizer. Nothing is lost: gradients reach the host in the weights' type, and its fp32 buffer
    would only hold the same values. It is faster, too: half as many bytes travel, and unscaling, clipping and
    AdamW go through a slice while it is in the cache.
    """
    all_masters, buffers = zero.single_partition_of_fp32_groups, zero.param_buffer_of_bit16_for_cpu_offload_groups
    zero.offload_gradient_dict.clear()  # views of the fp32 gradients
    for masters in all_masters:
        masters.grad = None
    for parameters in zero.params_in_partition:
        for parameter in parameters:
            name = zero.get_param_id(parameter)
            group, _, destination, size = zero.grad_position[name]
            if size == parameter.numel():  # not divided between two ranks
                zero.accumulated_grads_in_cpu[name] = buffers[group].narrow(0, destination, size)

    def receive(parameter: torch.nn.Parameter) -> None:
        """Start the copy of a gradient, or of this rank's part of it, from the GPU."""
        group, source, destination, size = zero.grad_position[zero.get_param_id(parameter)]
        gradient, stream = zero.get_param_gradient_attribute(parameter), get_accelerator().current_stream()
        for producer, event in zero._pending_offload_events.items():
            if producer != stream:  # an earlier copy may write to the same place
                stream.wait_event(event)
        part = gradient.view(-1).narrow(0, source, size)
        buffers[group].narrow(0, destination, size).copy_(part, non_blocking=True)
        zero._record_gradient_stream(gradient, stream)
        zero._record_offload_copy()  # DeepSpeed's step waits for it
        zero.clear_grad_attribute(parameter)

    factor, scale_gradients = torch.ones(1), zero.unscale_and_clip_grads

    def note_factor(_, norm) -> None:
        """Called with a group's gradients. They are not in fp32 yet: see what they would be multiplied by."""
        scale_gradients([factor.fill_(1)], norm)

    def step(group: int) -> None:
        _adam_w(zero.optimizer, group, all_masters[group], buffers[group], factor.item())

    zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu = receive
    zero.unscale_and_clip_grads = note_factor
    zero._optimizer_step = step


@torch.no_grad()
def _adam_w(optimizer, group: int, masters: torch.Tensor, gradients: torch.Tensor, factor: float) -> None:
    """Update `masters` of a group [parameters, fp32] with `factor` times `gradients` [parameters, any type]."""
    settings, state = optimizer.param_groups[group], optimizer.state[masters]
    compiled = isinstance(optimizer, DeepSpeedCPUAdam)
    if not state:
        state["step"] = 0 if compiled else torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(masters), torch.zeros_like(masters)
    before = state["step"]
    state["step"] = before + 1
    (beta1, beta2), eps = settings["betas"], settings["eps"]
    hyper = (settings["lr"], beta1, beta2, eps, settings["weight_decay"])
    wide = torch.empty(min(SLICE, len(masters)))
    whole = (masters.detach(), gradients, state["exp_avg"], state["exp_avg_sq"])
    for slices in zip(*(tensor.split(SLICE) for tensor in whole), strict=True):
        weights, gradient, *moments = slices
        gradient = wide[: len(gradient)].copy_(gradient).mul_(factor)
        if compiled:
            update = optimizer.ds_opt_adam.adam_update
            update(optimizer.opt_id, state["step"], *hyper, True, weights, gradient, *moments)
        else:
            mean, square = moments
            options = dict(zip(("lr", "beta1", "beta2", "eps", "weight_decay"), hyper, strict=True))
            adamw([weights], [gradient], [mean], [square], [], [before.clone()], fused=True, amsgrad=False,
                  maximize=False, **options)  # fmt: skip


def page_lock(zero) -> None:
    """Page-lock what the GPU reads and writes: the buffers of gradients and new weights.

    A copy between locked memory and the GPU runs by itself while both compute; one from ordinary memory goes through a
    small buffer of the driver's, and the GPU waits. If the system refuses, a warning prints what that costs.
    """
    for buffer in zero.param_buffer_of_bit16_for_cpu_offload_groups:
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
    """Free Adam's moments, 8 bytes per parameter. No step can follow."""
    zero.optimizer.state.clear()
    for group in zero.bit16_groups:
        for parameter in group:
            if parameter._hp_mapping is not None:
                parameter._hp_mapping.optim_fragment = None
