"""Host memory and seconds of pytorch-fsdp's loading, checkpoint and export: what happens outside of the steps.

    torchrun --nproc_per_node 2 bench/fsdp_io.py MODEL_FOLDER results/pytorch-fsdp/io.json

MODEL_FOLDER is one made by bench/real_shapes.py: fp16 weights of its shapes are written there first, as a
`pytorch_model.bin` like the published one. Memory is that of all processes together, above what they take before.
"""

import datetime
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from transformers import AutoConfig, AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "pytorch-fsdp"), str(REPOSITORY)]

import train  # noqa: E402

from common import models, runtime  # noqa: E402
from common.checkpoints import Checkpoints  # noqa: E402
from common.export import Export, gather_all  # noqa: E402
from common.metrics import HostMemory  # noqa: E402


def write_weights(folder: Path) -> int:
    """An fp16 pickle of the model's shapes; returns the bytes of its tensors."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    weights = {name: torch.full(tensor.shape, 0.01, dtype=torch.float16) for name, tensor in model.named_parameters()}
    torch.save(weights, folder / "pytorch_model.bin")
    return sum(tensor.nbytes for tensor in weights.values())


class Phase:
    """Times a block and finds how far the host memory of all ranks rose in it; a collective."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        gc.collect()
        dist.barrier()
        self.memory = HostMemory(os.getppid(), every_seconds=0.05) if dist.get_rank() == 0 else None
        time.sleep(0.5)
        self.before = self.memory.peak_gib if self.memory else 0
        self.start = time.perf_counter()

    def __exit__(self, *_):
        dist.barrier()
        if self.memory:
            seconds = time.perf_counter() - self.start
            time.sleep(0.2)
            self.memory.stop()
            RECORD[self.name] = {"seconds": round(seconds, 2), "host_gib": round(self.memory.peak_gib - self.before, 2)}
            print(self.name, RECORD[self.name], flush=True)


RECORD = {}


def main() -> None:
    folder, record_path = Path(sys.argv[1]), Path(sys.argv[2])
    cfg = train.Config()
    cfg.model.name = str(folder)
    rank, world_size, device = train.setup_distributed(cfg)
    dtype, reason = runtime.resolve_precision("auto", device)
    bytes_on_disk = write_weights(folder) if rank == 0 else 0
    dist.all_reduce(torch.ones(1, device=device))  # NCCL's own memory is there from now on

    with Phase("load"):
        model = train.build_model(cfg, device, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(models.parameter_groups(model, 0.01), lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    ids = torch.arange(512, device=device).reshape(1, 512)
    model(input_ids=ids, labels=ids).backward()
    optimizer.step()
    optimizer.zero_grad()

    scratch = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()) / "fsdp-io"
    checkpoints = Checkpoints(scratch, 1, {})
    with Phase("checkpoint"):
        train.save_checkpoint(checkpoints, 1, model, optimizer, scaler)
    with Phase("checkpoint read"):
        train.load_checkpoint(scratch / "step-00000001", model, optimizer, scaler)
    weights, moments = train.get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    with Phase("shards alone, PyTorch's default writer"):
        dcp.save(state, checkpoint_id=scratch / "sync")
    own_group = dist.new_group(backend="gloo")  # a thread's collectives must not mix with the training's
    with Phase("asynchronous, until training may continue"):
        future = dcp.async_save(state, checkpoint_id=scratch / "async", process_group=own_group)
    with Phase("asynchronous, the rest"):
        future.result()
    with Phase("export"):
        if rank == 0:
            Export(cfg.model, scratch / "model").write(model.model, "", train.DTensor.full_tensor)
        else:
            gather_all(model.model, train.DTensor.full_tensor)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(scratch)
        (folder / "pytorch_model.bin").unlink()
        record = {
            "date": datetime.date.today().isoformat(),
            "writer": "a file for each tensor",
            "model": folder.name,
            "parameters": parameters,
            "published_fp16_gib": round(bytes_on_disk / 2**30, 3),
            "master_weights_gib": round(parameters * 4 / 2**30, 3),
            "gpus": world_size,
            "phases": RECORD,
            "environment": runtime.describe_environment(world_size, reason),
        }
        record_path.parent.mkdir(parents=True, exist_ok=True)
        record_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
