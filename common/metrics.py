"""Measures: FLOPs a token, the hardware's peak, start-up by phase, GPU memory, host memory of the process tree."""

from __future__ import annotations

import os
import threading
import time

import psutil
import torch

# Dense peak of the tensor cores, TFLOP/s, from NVIDIA's data sheets: (16-bit, fp32 outside the tensor cores).
PEAK_TFLOPS = {
    "T4": (65, 8.1),
    "P100": (18.7, 9.3),
    "V100": (125, 15.7),
    "L4": (121, 30.3),
    "A10": (125, 31.2),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "H100": (989, 67),
    "H200": (989, 67),
    "B200": (2250, 80),
}


def flops_per_token(model: torch.nn.Module, length: int) -> float:
    """Floating-point operations that training spends on a token: 6 N + 6 × layers × width × length.

    N counts the parameters that take part in a matrix product (an input embedding that is not tied to the head only
    looks rows up); the second term is causal attention, half of the 12 × layers × width × length of
    https://arxiv.org/abs/2204.02311 (appendix B). Recomputation by activation checkpointing is not counted.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = sum(p.numel() for p in model.parameters())
    if embedding is not head:
        parameters -= embedding.numel()
    config = model.config
    return 6.0 * parameters + 6.0 * config.num_hidden_layers * config.hidden_size * length


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The data sheet's FLOP/s of one GPU for `dtype`; None on a CPU and if the GPU is not known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").replace("/", " ").split()
    known = next((PEAK_TFLOPS[word] for word in words if word in PEAK_TFLOPS), None)
    return known[dtype == torch.float32] * 1e12 if known else None


class StartUp:
    """Seconds from the start of a command to the end of its first optimizer step, by phase.

    - `imports`: the launcher, Python's libraries, the process group, until the run folder is opened
    - `data`: rows are read and tokenized, or found in the cache; the tokenizer and the model's configuration before
    - `model`: weights are loaded, wrapped and sharded; the optimizer and the checkpoint to resume from
    - `first_step`: the tracker, the held-out loss before training, compilation and the first step
    - `total`: their sum
    """

    def __init__(self, started_at: float):
        self.seconds: dict[str, float] = {}
        self._started = self._last = started_at

    def end(self, phase: str) -> None:
        """`phase` has ended just now, and the next one begins; only the first end of a phase counts."""
        if phase not in self.seconds:
            now = time.time()
            self.seconds[phase], self._last = round(now - self._last, 2), now
            if phase == "first_step":
                self.seconds["total"] = round(now - self._started, 2)


class HostMemory:
    """Peak memory in GiB of a process and all below it, sampled every second by a thread.

    Sums the proportional set sizes: a page that several processes share (libraries, forked workers) counts once. If
    the system does not report it (macOS), resident set sizes, which count it once per process.
    """

    def __init__(self, root_pid: int | None = None, every_seconds: float = 1.0):
        self.peak_gib = 0.0
        self._root = psutil.Process(root_pid or os.getpid())
        self._stopped = threading.Event()
        self._every = every_seconds
        threading.Thread(target=self._watch, daemon=True, name="host-memory").start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.Error:
                return
            self.peak_gib = max(self.peak_gib, sum(map(_host_bytes, processes)) / 2**30)
            self._stopped.wait(self._every)


def _host_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except psutil.AccessDenied:
        memory = process.memory_info()
    except psutil.Error:  # it has ended meanwhile
        return 0
    return getattr(memory, "pss", memory.rss)


def peak_gpu_gib(device: torch.device) -> float:
    """The most memory that this process's tensors took on its GPU so far, GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
