"""Run a script with the attention kernels that a T4 has: `python bench/as_t4.py SCRIPT [arguments]`.

A T4 (compute capability 7.5) has neither the flash nor the cuDNN attention kernel, so a larger GPU that is to show how
much memory a T4 needs must not use them either. Set train.precision=fp16 and runtime.gpu_memory_limit_gib=14.7 as well.
"""

import runpy
import sys
from pathlib import Path

import torch

torch.backends.cuda.enable_flash_sdp(False)
torch.backends.cuda.enable_cudnn_sdp(False)
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
