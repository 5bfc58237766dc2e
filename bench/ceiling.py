"""The bf16 matrix-product rate of this machine's first GPU, TFLOP/s: what no training step can exceed.

Random data (zeros run faster), 8192 × 8192 × 8192, the median of 30 products.
"""

import torch

SIZE = 8192


def matmul_tflops() -> float:
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(35):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ b
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return 2 * SIZE**3 / sorted(seconds[5:])[15] / 1e12


if __name__ == "__main__":
    print(round(matmul_tflops(), 1))
