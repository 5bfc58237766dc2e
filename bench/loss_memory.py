"""Peak GPU memory and time of the output head with its loss, forward and backward: plain against chunked.

    python bench/loss_memory.py results/pytorch-ddp/loss-memory.json

Qwen2-0.5B's head (151,936 × 896), bf16 autocast over fp32 weights, 1 × 512, 4 × 512 and 32 × 1024 tokens. Also the
distance of each gradient from the fp64 one.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F

from common.loss import linear_cross_entropy

VOCABULARY, WIDTH = 151936, 896


def plain(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def inputs(tokens: int, dtype: torch.dtype):
    generator = torch.Generator("cuda").manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, device="cuda", generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, device="cuda", generator=generator) * 0.02
    targets = torch.randint(VOCABULARY, (tokens,), device="cuda", generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def measure(loss_function, tokens: int) -> tuple[dict, tuple[torch.Tensor, torch.Tensor]]:
    hidden, weight, targets = inputs(tokens, torch.float32)
    seconds = []
    for _ in range(5):
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_function(hidden, weight, targets)
        loss.backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() - before
    figures = {"peak_gib": round(peak / 2**30, 3), "milliseconds": round(1000 * min(seconds), 2), "loss": loss.item()}
    return figures, (hidden.grad, weight.grad)


def main() -> None:
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "head": [VOCABULARY, WIDTH]}
    hidden, weight, targets = inputs(2048, torch.float64)
    plain_fp64 = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    plain_fp64.backward()
    exact = hidden.grad, weight.grad
    for tokens in (512, 2048, 32768):
        for name, function in (("plain", plain), ("chunked", linear_cross_entropy)):
            figures, gradients = measure(function, tokens)
            if tokens == 2048:
                for part, ours, theirs in zip(("hidden", "weight"), gradients, exact, strict=True):
                    figures[f"gradient_error_{part}"] = ((ours.double() - theirs).norm() / theirs.norm()).item()
            record[f"{name}_{tokens}_tokens"] = figures
            print(name, tokens, figures)
    with open(sys.argv[1], "w") as file:
        json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
