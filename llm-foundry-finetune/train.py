"""Fine-tune a language model with MosaicML LLM Foundry, on Composer's trainer and FSDP.

Here a framework owns the loop. What is trained, on what and how stands in foundry.yaml: that is the lesson. This file
hands it the settings of config.yaml, the data and a checkpoint to resume from, and takes the trained model out again.

    llm-foundry-finetune/launch.sh                                  # the real run: one process per GPU found
    llm-foundry-finetune/launch.sh --config smoke.yaml              # no GPU: two processes on the CPU
    composer -n 2 llm-foundry-finetune/train.py                     # the same as launch.sh on two GPUs
    python llm-foundry-finetune/train.py --config smoke.yaml train.max_steps=20      # one process; any key can be set

The last two in LLM Foundry's environment (. .venv-foundry/bin/activate). `--help` lists all keys. A run that was
stopped or killed resumes when the same command is given again.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from settings import PROJECT, Config

from common.config import accumulation_steps, check_command_line, parse_config

if __name__ == "__main__":
    check_command_line(Config, __file__)  # before torch is imported, which takes seconds

import datasets
import torch
import torch.distributed as dist
import transformers
from catalogue import RegistryError
from composer.core import Callback, State
from composer.utils import dist as composer_dist
from composer.utils import get_device
from composer.utils.checkpoint import save_checkpoint as composer_save_checkpoint
from foundry_settings import read_settings, write_settings
from llmfoundry import registry
from llmfoundry.command_utils import train_from_yaml
from llmfoundry.data.finetuning.tasks import dataset_constructor
from llmfoundry.utils.exceptions import BaseContextualError
from prepare_data import Prepared, check_data_settings, prepare, tokens_of_line
from run_callback import DocumentAttention, GradientNorm, RunFolderCallback, collate_documents
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import cached_file

from common import errors, models, runtime
from common.checkpoints import Checkpoints, identity
from common.errors import UserError
from common.hub import check_can_push, token
from common.loss import check_loss
from common.run_folder import RunFolder
from common.token_cache import wait_for_all_ranks


def setup_distributed(cfg: Config) -> tuple[int, int, torch.device]:
    """Join the process group that the launcher describes in the environment; return rank, world size and device."""
    os.environ["FSDP_VERSION"] = "2"  # the first FSDP, Composer's default, asks for a GPU
    gpus = torch.cuda.device_count()
    runtime.check_process_count()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpus else torch.device("cpu")
    runtime.check_device(cfg, device)
    if gpus:
        torch.cuda.set_device(device)
        runtime.limit_gpu_memory(cfg.runtime, device)
    elif cfg.train.precision not in ("auto", "fp32"):
        raise UserError(f"train.precision={cfg.train.precision}: Composer computes in fp32 on a CPU: set it to auto")
    if cfg.train.compile:
        raise UserError("train.compile=true: Composer would compile model and exchanges in one piece: set it to false")
    logging.captureWarnings(True)  # libraries warn of their own insides, and Composer resets Python's filters
    logging.getLogger("py.warnings").propagate = False
    # NOTE: the timeout ends all ranks when one has died or hangs; without it the other ranks would wait forever.
    composer_dist.initialize_dist(get_device(None), timeout=cfg.runtime.timeout_minutes * 60)
    # Foundry's ranks wait for a file in the working folder, by one name on all machines: those that share the folder
    # would remove each other's.
    name = composer_dist.get_node_signal_file_name
    composer_dist.get_node_signal_file_name = lambda rng=None: f"{name(rng)}-{composer_dist.get_node_rank()}"
    return dist.get_rank(), dist.get_world_size(), device


@contextlib.contextmanager
def in_place_of(folder: Path) -> Iterator[Path]:
    """A new folder, which becomes `folder` at the end of the block; an error leaves the earlier one as it was."""
    folder = folder.resolve()  # it may be a link to a larger disk
    new = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(new, ignore_errors=True)  # of a start that was killed
    new.mkdir()
    try:
        yield new
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def build_model(cfg: Config, folder: Path) -> str | None:
    """The folder with the model that Foundry is to build; None for an embedded one, which is written to `folder`.

    Only rank 0 calls this. Raises `UserError` if the model is unavailable: Foundry would meet that on all ranks.
    """
    embedded = cfg.model.name.startswith("tiny:")
    if embedded or not cfg.model.random_weights:  # else Foundry makes them, and there may be none to read
        model = models.load_model(cfg.model, cfg.seed, dtype="auto")
        check_loss(model)  # Foundry's is the model's own; so it must be the one that all projects compute
    if embedded:
        model.save_pretrained(folder)
        return None
    source = models.located(cfg.model).name
    if Path(source).is_dir():
        return str(Path(source).resolve())
    return str(Path(cached_file(cfg.model.name, "config.json", revision=cfg.model.revision, token=token())).parent)


def foundry_variables(
    cfg: Config, folder: Path, model: str | None, prepared: Prepared, dtype: torch.dtype, checkpoint: Path | None
) -> dict:
    """What foundry.yaml takes as `variables.run`: what follows from the settings, the data and the machine."""
    architecture = models.load_model_config(cfg.model)
    without_dropout = {name: 0.0 for part, name in models.random_settings(architecture) if part is architecture}
    if checkpoint:  # a file, or several ranks' folder, which Composer named
        (checkpoint,) = (checkpoint / "composer").iterdir()
    return {
        "model": model or str(folder / "base-model"),
        "tokenizer": str(folder / "tokenizer"),
        "pretrained": not cfg.model.random_weights or cfg.model.name.startswith("tiny:"),
        "init_device": "mixed" if dist.get_world_size() > 1 else "cpu",
        "config_overrides": without_dropout,
        "attention": "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(architecture)]._supports_sdpa else "eager",
        "train_file": glob.escape(str(folder / prepared.train_file.name)),  # read as a pattern
        "eval_file": glob.escape(str(folder / prepared.eval_file.name)),
        "cache": str(folder / "cache"),
        "target_responses": "all" if cfg.data.packing == "documents" else "last",
        "packing_ratio": cfg.foundry.packing_ratio if cfg.foundry.packing_ratio > 1 else None,
        "dtype": next(name for name, of in runtime.DTYPES.items() if of == dtype),
        "total_steps": prepared.total_steps,
        "eval_interval": f"{cfg.eval.every or prepared.total_steps}ba",
        # PyTorch's AdamW takes learning rate × weight decay off the weights, Composer's learning rate / peak × its own.
        "decoupled_weight_decay": cfg.train.weight_decay * cfg.train.learning_rate,
        "timeout_seconds": cfg.runtime.timeout_minutes * 60,
        "checkpoint": str(checkpoint) if checkpoint else None,
    }


def save_checkpoint(checkpoints: Checkpoints, step: int, state: State) -> None:
    """Write everything that the next step depends on, by Composer: each rank its shards, one process one file."""
    rank = dist.get_rank()
    if rank == 0:
        checkpoints.begin(step)
    dist.barrier()
    file = "__{rank}_0.distcp" if dist.get_world_size() > 1 else "rank0.pt"
    composer_save_checkpoint(state, str(checkpoints.writing(step) / "composer" / file))
    dist.barrier()
    if rank == 0:
        checkpoints.commit(step)
    dist.barrier()


def export_model(run: RunFolder, state: State) -> None:
    """`model/`, a tensor at a time: the sharded tensors are gathered whole, in fp32."""
    model = state.model.model
    for name, module in list(model.named_modules()):  # activation checkpointing put each layer into a wrapper
        if hasattr(module, "_checkpoint_wrapped_module"):
            model.set_submodule(name, module._checkpoint_wrapped_module)
    for module in state.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the outermost module's weights are still whole
    run.save_model(model, lambda t: t.full_tensor() if isinstance(t, DTensor) else t.detach())


def train(cfg: Config) -> None:
    settings = read_settings(cfg)
    check_data_settings(cfg)
    rank, world_size, device = setup_distributed(cfg)
    stop = runtime.StopRequest(cfg.runtime)
    dtype, reason = runtime.resolve_precision(cfg.train.precision, device)
    accumulation_steps(cfg, world_size)  # refuses a global batch that cannot be split
    if rank == 0:
        check_can_push(cfg)
    runtime.seed_everything(cfg.seed)
    runtime.only_main_shows_progress(rank == 0)
    transformers.utils.logging.set_verbosity_error()
    environment = runtime.describe_environment(world_size, reason)
    with RunFolder(cfg, PROJECT, rank == 0, environment) as run, runtime.explain_out_of_memory(cfg):
        tokenizer = models.load_tokenizer(cfg.model)
        architecture = models.architecture(models.load_model_config(cfg.model, cfg.data))
        folder = run.path / "foundry"
        shared = [None]
        if rank == 0:  # the other ranks wait, and get what it found
            with in_place_of(folder) as new:
                prepared = prepare(cfg, tokenizer, new, world_size)
                tokenizer.save_pretrained(new / "tokenizer")
                model = build_model(cfg, new / "base-model")
                same_run = identity(cfg, PROJECT, architecture, prepared.fingerprint) | {
                    "foundry.packing_ratio": cfg.foundry.packing_ratio,
                    "the number of processes": "one" if world_size == 1 else "several",
                }
                checkpoints = Checkpoints(run.checkpoints, cfg.checkpoint.keep, same_run)
                first_step, checkpoint = checkpoints.find(cfg.checkpoint.resume) or (0, None)
                values = foundry_variables(cfg, folder, model, prepared, dtype, checkpoint)
                write_settings(cfg, settings, values, new / "foundry.yaml")
            shared = [(prepared, same_run, first_step, checkpoint)]
        wait_for_all_ranks(succeeded=True)  # to tokenize many rows takes longer than a collective waits
        dist.broadcast_object_list(shared)
        prepared, same_run, first_step, checkpoint = shared[0]
        run.log_rows(prepared.counts)
        if prepared.rows < 20_000:
            datasets.disable_progress_bars()
        if rank:  # rank 0's knows which one the run resumes from
            checkpoints = Checkpoints(run.checkpoints, cfg.checkpoint.keep, same_run)

        callback = RunFolderCallback(
            run,
            cfg,
            stop,
            save=lambda step, state: save_checkpoint(checkpoints, step, state),
            begin=lambda model: run.begin(model, device, dtype, first_step, prepared.total_steps, checkpoint),
            prepared=prepared,
        )
        # Foundry would tokenize prompt and response apart; prepare_data.py has done it, in one piece.
        read = functools.partial(dataset_constructor.build_from_hf, mapping_fn=tokens_of_line)
        dataset_constructor.build_from_hf = read
        registry.callbacks.register("gradient_norm", func=GradientNorm)
        registry.callbacks.register("document_attention", func=DocumentAttention)
        registry.collators.register("finetuning_collator", func=collate_documents)
        # Foundry makes callbacks by calling a class; the only instance of this one exists already.
        registry.callbacks.register(
            "run_folder", func=type("OfThisRun", (Callback,), {"__new__": lambda cls: callback})
        )
        try:
            train_from_yaml(str(folder / "foundry.yaml"))
        except (BaseContextualError, RegistryError, ValueError, TypeError, KeyError, AttributeError) as error:
            if callback.state is None:  # Foundry has not built what the file describes
                problem = str(error).strip().splitlines()
                raise UserError(
                    f"{cfg.foundry.file}: {type(error).__name__}: {problem[0] if problem else ''}"
                ) from error
            if first_step < prepared.total_steps:  # else: Composer will not fit a run that has all its steps
                raise
        state, step = callback.state, callback.state.timestamp.batch.value
        if rank == 0:
            shutil.rmtree(folder / "cache", ignore_errors=True)
        if step < prepared.total_steps:
            return run.finish("interrupted", stop.reason)
        if first_step < prepared.total_steps:
            save_checkpoint(checkpoints, step, state)
        export_model(run, state)
        run.finish("completed")


def main() -> None:
    train(parse_config(Config, __file__))
    dist.destroy_process_group()


if __name__ == "__main__":
    errors.run(main)
