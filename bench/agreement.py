"""Who computes the exact loss? Other libraries' documented loops and pytorch-ddp train one model on the same batches.

    python bench/agreement.py                 # results/agreement/losses.json; two CPU processes, two minutes
    python bench/agreement.py --only trl      # one of them, and no record

Needs TRL and Lightning, in a folder of their own (bench/peers/requirements.txt). A global batch of 16 rows is 2 ranks
× 2 micro-batches × 4 rows, and prompts are no targets: so no two micro-batches have as many targets. The exact
gradient is that of the mean over all targets of the global batch. A loop that averages the means of micro-batches, or
of ranks, weighs the tokens of short answers more. With `--equal`, the control, all rows have equally many targets, and
all loops agree.

Each loop is what its library's documentation shows for gradient accumulation on several processes. fp32, AdamW, a
constant learning rate, gradients clipped to 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from common import data, models, runtime
from common.config import REPOSITORY, BaseConfig, ModelConfig, load_config
from common.loss import IGNORE

STEPS, MICRO, ACCUMULATION, RANKS = 10, 4, 2, 2
RATE, CLIP = 1e-3, 1.0
SETTINGS = [
    "model.name=tiny:llama", f"train.max_steps={STEPS}", f"train.global_batch_size={MICRO * ACCUMULATION * RANKS}",
    f"train.micro_batch_size={MICRO}", f"train.learning_rate={RATE}", f"train.max_grad_norm={CLIP}",
    "train.lr_schedule=constant", "train.warmup_steps=0", "train.precision=fp32", "data.eval_rows=64",
    "tracking.backend=none", "checkpoint.every=0", "eval.every=0",
]  # fmt: skip
SHORTEST = 6  # targets of every row of the control
PEERS = REPOSITORY / "build/peers"
FOUNDRY = ("composer", "foundry")  # which run in LLM Foundry's own environment
TRAINED = "trained.safetensors"


class Rows(torch.utils.data.Dataset):
    """The training rows in the order of the steps, tokenized: what each loop reads from the front, unshuffled."""

    def __init__(self, folder: Path):
        self.rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return self.rows[i]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Padded on the right, with an attention mask, as the collators of the libraries do it."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORE), "attention_mask": mask}


def start(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "model").train()  # fp32, as written


def finish(model: torch.nn.Module, folder: Path) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        state = {name: p.detach().contiguous().clone() for name, p in model.named_parameters()}
        save_file(state, folder / TRAINED)


def ddp_tutorial(folder: Path) -> None:
    """torch's DDP with `no_sync`, the loss of a micro-batch divided by their number."""
    dist.init_process_group("gloo")
    model = start(folder)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    sampler = torch.utils.data.DistributedSampler(Rows(folder), shuffle=False)
    for number, batch in enumerate(DataLoader(Rows(folder), MICRO, sampler=sampler, collate_fn=collate)):
        last = (number + 1) % ACCUMULATION == 0
        wrapped.require_backward_grad_sync = last  # what no_sync() sets
        (wrapped(**batch).loss / ACCUMULATION).backward()
        if last:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    finish(model, folder)
    dist.destroy_process_group()


def accelerate_loop(folder: Path) -> None:
    """Accelerate's `accumulate`, as on its page about gradient accumulation."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    model = start(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    loader = DataLoader(Rows(folder), MICRO, collate_fn=collate)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    finish(model, folder)
    accelerator.end_training()


def transformers_options(folder: Path) -> dict:
    """Arguments of transformers' Trainer, and of those that are built on it."""
    return {
        "output_dir": str(folder / "trainer"), "max_steps": STEPS, "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": ACCUMULATION, "learning_rate": RATE, "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP, "weight_decay": 0.0, "optim": "adamw_torch", "train_sampling_strategy": "sequential",
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False,
    }  # fmt: skip


def hf_trainer(folder: Path) -> None:
    """transformers' Trainer with its defaults."""
    from transformers import Trainer, TrainingArguments

    model = start(folder)
    arguments = TrainingArguments(**transformers_options(folder))
    Trainer(model, arguments, train_dataset=Rows(folder), data_collator=collate).train()
    finish(model, folder)


def trl(folder: Path) -> None:
    """TRL's SFTTrainer with its defaults, on rows that are tokenized and labelled already."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = start(folder)
    tokenizer = models.load_tokenizer(ModelConfig("tiny:llama"))
    arguments = SFTConfig(**transformers_options(folder), gradient_checkpointing=False)
    rows = Dataset.from_list(Rows(folder).rows)
    SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    finish(model, folder)


def lightning(folder: Path) -> None:
    """Lightning's Trainer with `accumulate_grad_batches`."""
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = start(folder)

        def training_step(self, batch: dict, number: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0)

    module = Module()
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", devices=RANKS, strategy="ddp", max_steps=STEPS, accumulate_grad_batches=ACCUMULATION,
        gradient_clip_val=CLIP, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=folder,
    )  # fmt: skip
    rank = int(os.environ["RANK"])
    sampler = torch.utils.data.DistributedSampler(Rows(folder), num_replicas=RANKS, rank=rank, shuffle=False)
    trainer.fit(module, DataLoader(Rows(folder), MICRO, sampler=sampler, collate_fn=collate))
    finish(module.model, folder)


def deepspeed_engine(folder: Path) -> None:
    """DeepSpeed's engine with `gradient_accumulation_steps`: backward() and step() after every micro-batch."""
    import deepspeed

    model = start(folder)
    deepspeed.init_distributed("gloo")
    settings = {
        "train_micro_batch_size_per_gpu": MICRO, "gradient_accumulation_steps": ACCUMULATION, "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 0, "torch_adam": True}},
    }  # fmt: skip
    sampler = torch.utils.data.DistributedSampler(Rows(folder), shuffle=False)
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    for batch in DataLoader(Rows(folder), MICRO, sampler=sampler, collate_fn=collate):
        engine.backward(engine(**batch).loss)
        engine.step()
    finish(model, folder)
    dist.destroy_process_group()


def deepspeed_pipeline(folder: Path) -> None:
    """DeepSpeed's PipelineModule, one stage per rank: a list of modules, their mean loss, `train_batch`."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    model = start(folder)
    llama = model.model

    class Embedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = llama.embed_tokens

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.embedding(ids)

    class Layer(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer, self.rotary = layer, llama.rotary_emb

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(hidden.shape[1])[None]
            return self.layer(hidden, position_ids=positions, position_embeddings=self.rotary(hidden, positions))

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def head(embedding: Embedding, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ embedding.embedding.weight.T

    deepspeed.init_distributed("gloo")
    tied = {"typename": Embedding, "tied_weight_attr": "embedding.weight"}
    first, last = TiedLayerSpec("embedding", **tied), TiedLayerSpec("embedding", **tied, forward_fn=head)
    layers = [first, *(LayerSpec(Layer, layer) for layer in llama.layers), llama.norm, last]
    pipeline = PipelineModule(layers, num_stages=RANKS, loss_fn=loss, partition_method="uniform")
    settings = {
        "train_micro_batch_size_per_gpu": MICRO, "gradient_accumulation_steps": ACCUMULATION * RANKS,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 0, "torch_adam": True}},
        "gradient_clipping": CLIP,
    }  # fmt: skip
    engine, _, _, _ = deepspeed.initialize(model=pipeline, model_parameters=pipeline.parameters(), config=settings)
    longest = max(len(row["input_ids"]) for row in Rows(folder).rows)

    def micro_batch(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        blank = {"input_ids": [0] * longest, "labels": [IGNORE] * longest}  # all micro-batches have one shape
        batch = collate([*rows, blank])
        return batch["input_ids"][:-1], batch["labels"][:-1]

    batches = iter(DataLoader(Rows(folder), MICRO, collate_fn=micro_batch))
    for _ in range(STEPS):
        engine.train_batch(data_iter=batches)
    mine = {id(parameter) for parameter in pipeline.parameters()}
    state = {name: p.detach().contiguous() for name, p in model.named_parameters() if id(p) in mine}
    save_file(state, folder / f"stage-{dist.get_rank()}.safetensors")
    dist.barrier()
    if dist.get_rank() == 0:
        stages = [load_file(folder / f"stage-{rank}.safetensors") for rank in range(RANKS)]
        save_file({name: tensor for stage in stages for name, tensor in stage.items()}, folder / TRAINED)
    dist.destroy_process_group()


def composer_trainer(folder: Path, **options) -> None:
    """Composer's Trainer, which cuts a rank's batch into micro-batches."""
    from composer import DataSpec, Trainer
    from composer.algorithms import GradientClipping
    from composer.models import HuggingFaceModel
    from llmfoundry.data.utils import get_tokens_per_batch_func

    model, rank = start(folder), int(os.environ["RANK"])
    sampler = torch.utils.data.DistributedSampler(Rows(folder), num_replicas=RANKS, rank=rank, shuffle=False)
    loader = DataLoader(Rows(folder), MICRO * ACCUMULATION, sampler=sampler, collate_fn=collate)
    Trainer(
        model=HuggingFaceModel(model), optimizers=torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0),
        train_dataloader=DataSpec(loader, get_num_tokens_in_batch=get_tokens_per_batch_func()),
        device_train_microbatch_size=MICRO, max_duration=f"{STEPS}ba", precision="fp32", device="cpu",
        algorithms=[GradientClipping(clipping_type="norm", clipping_threshold=CLIP)], progress_bar=False, **options,
    ).fit()  # fmt: skip
    finish(model, folder)


def foundry(folder: Path) -> None:
    """LLM Foundry's default for how Composer adds up micro-batches."""
    from llmfoundry.utils.config_utils import TrainConfig

    default = TrainConfig.__dataclass_fields__["accumulate_train_batch_on_tokens"].default
    composer_trainer(folder, accumulate_train_batch_on_tokens=default)


# Each loop by name: the library whose version counts, its label, the loop.
LOOPS = {
    "ddp": ("torch", "torch's DDP, loss ÷ micro-batches", ddp_tutorial),
    "accelerate": ("accelerate", "Accelerate's `accumulate`", accelerate_loop),
    "lightning": ("pytorch-lightning", "Lightning's Trainer", lightning),
    "deepspeed": ("deepspeed", "DeepSpeed's engine", deepspeed_engine),
    "pipeline": ("deepspeed", "DeepSpeed's PipelineModule", deepspeed_pipeline),
    "composer": ("mosaicml", "Composer's Trainer", composer_trainer),
    "foundry": ("llm-foundry", "LLM Foundry's default", foundry),
    "hf-trainer": ("transformers", "transformers' Trainer", hf_trainer),
    "trl": ("trl", "TRL's SFTTrainer", trl),
}


def prepare(folder: Path, equal: bool) -> list:
    """Write the model and the rows of all steps to `folder`, cut to equally many targets or not; the held-out rows."""
    cfg = load_config(BaseConfig, REPOSITORY / "pytorch-ddp/smoke.yaml", SETTINGS)
    tokenizer = models.load_tokenizer(cfg.model)
    training, held_out = data.load_rows(cfg.data, cfg.seed)
    rows = data.tokenize(training, cfg.data, tokenizer)
    models.load_model(cfg.model, cfg.seed).save_pretrained(folder / "model")
    order = [i for step in data.StepSampler(rows, cfg, rank=0, world_size=1) for i in step]
    lists = [{key: value.tolist() for key, value in rows[i].items()} for i in order]
    if equal:
        for row in lists:
            places = [i for i, label in enumerate(row["labels"]) if label != IGNORE and i]
            for i in places[SHORTEST:]:
                row["labels"][i] = IGNORE
            row["labels"][0] = IGNORE
        enough = [row for row in lists if sum(label != IGNORE for label in row["labels"]) == SHORTEST]
        lists = [enough[i % len(enough)] for i in range(len(lists))]
    (folder / "rows.json").write_text(json.dumps(lists), encoding="utf-8")
    return list(data.tokenize(held_out, cfg.data, tokenizer, packing="none"))


def plain(folder: Path) -> dict[str, torch.Tensor]:
    """The reference: one process, the whole global batch at once."""
    model, rows = start(folder), Rows(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    size = MICRO * ACCUMULATION * RANKS
    for first in range(0, STEPS * size, size):
        model(**collate([rows[i] for i in range(first, first + size)])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def ours(folder: Path) -> None:
    """pytorch-ddp by its launch.sh, which exports what it trained."""
    run = folder / "ours"
    command = ["pytorch-ddp/launch.sh", "--config", "smoke.yaml", *SETTINGS, f"output_dir={run}"]
    subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"NPROC_PER_NODE": str(RANKS)}, check=True, capture_output=True
    )
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    finish(model, folder)


def python(name: str) -> str:
    return str(REPOSITORY / ".venv-foundry/bin/python") if name in FOUNDRY else sys.executable


def version_of(library: str, name: str) -> str:
    code = f"import importlib.metadata as m, sys; sys.path.append({str(PEERS)!r}); print(m.version({library!r}))"
    return subprocess.run([python(name), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def train(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the loop `name`, run by torchrun."""
    (folder / TRAINED).unlink(missing_ok=True)
    if name == "ours":
        ours(folder)
    else:
        paths = [str(REPOSITORY), *([] if name in FOUNDRY else [str(PEERS)]), os.environ.get("PYTHONPATH", "")]
        variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        torchrun = [python(name), "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
        command = [*torchrun, __file__, "--loop", name, str(folder)]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {name} failed:\n{done.stderr[-3000:]}")
    return load_file(folder / TRAINED)


def distance(weights: dict, reference: dict, before: dict) -> float:
    """How far `weights` are from the reference's, relative to how far those moved."""

    def norm(a: dict, b: dict) -> float:
        return sum((a[name] - b[name]).double().square().sum().item() for name in reference) ** 0.5

    return norm(weights, reference) / norm(reference, before)


@torch.no_grad()
def held_out_loss(folder: Path, weights: dict, rows: list) -> float:
    model = start(folder).eval()
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    batch = collate([{key: value.tolist() for key, value in row.items()} for row in rows])
    return model(**batch).loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*LOOPS, "ours"], help="these only, and no record")
    parser.add_argument("--equal", action="store_true", help="the control only, and no record")
    parser.add_argument("--loop", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)  # a rank of one
    arguments = parser.parse_args()
    if arguments.loop:
        name, folder = arguments.loop
        return LOOPS[name][2](Path(folder))
    if not (PEERS / "trl").is_dir() and {"trl", "lightning"} & {*(arguments.only or LOOPS)}:
        parser.error(
            "TRL and Lightning are missing: pip install --no-deps --target build/peers -r bench/peers/requirements.txt"
        )
    record = {
        "date": datetime.date.today().isoformat(),
        "environment": runtime.describe_environment(RANKS, "fp32: as set"),
        "settings": dict(setting.split("=", 1) for setting in SETTINGS),
        "loops": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        held_out = prepare(folder, arguments.equal)
        before, reference = load_file(folder / "model/model.safetensors"), plain(folder)
        before = {name: before[name] for name in reference}
        exact = record["held_out_loss"] = held_out_loss(folder, reference, held_out)
        print(f"{'plain loop':36} held-out loss {exact:.6f}")
        for name in arguments.only or ([*LOOPS] if arguments.equal else [*LOOPS, "ours"]):
            weights = train(name, folder)
            library, label = LOOPS[name][:2] if name in LOOPS else ("", "`pytorch-ddp`")
            loss, apart = held_out_loss(folder, weights, held_out), distance(weights, reference, before)
            version = version_of(library, name) if library else ""
            record["loops"][label] = {"version": version, "held_out_loss": loss, "weights": apart}
            print(
                f"{label + ' ' + version:36} held-out loss {loss:.6f}, weights {apart:.1e} of their way apart",
                flush=True,
            )
    if not arguments.only and not arguments.equal:
        path = REPOSITORY / "results/agreement/losses.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
