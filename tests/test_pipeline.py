"""deepspeed-pipeline by its real launchers: equality with pytorch-ddp on any grid, kill and resume, export, errors."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, refused
from launching import (
    EQUAL,
    PYTHON,
    SMOKE,
    assert_close,
    curve,
    environment,
    error_line,
    finished_run,
    kill_at_step,
    losses,
    metrics,
    project_modules,
    ranks_of,
    run,
    start,
    wait_for_step,
)
from transformers import AutoModelForCausalLM
from wandb_log import history, read_wandb

from common import models
from common.config import ModelConfig, load_config
from common.loss import token_losses

PROJECT = "deepspeed-pipeline"
# What both projects are given. About half of the steps clip; whose docstrings they learn depends on the Python.
SAME = [*EQUAL, "train.weight_decay=0.1", "train.max_grad_norm=0.65"]


@pytest.fixture(scope="module")
def modules():
    with project_modules(PROJECT, "stages", "partition", "masters", "ds_settings", "train") as found:
        yield found


@pytest.fixture(scope="module")
def names(untied) -> dict[str, str]:
    """Models by kind: tied ones are embedded, the untied one is read from a file."""
    return {"tied": "tiny:llama", "untied": untied, "qwen2": "tiny:qwen2"}


@pytest.fixture(scope="module")
def ddp(names):
    """All records of pytorch-ddp in one process, which equals a plain loop (test_ddp.py)."""

    def of(kind: str) -> Path:
        folder = finished_run("pytorch-ddp", *SAME, f"model.name={names[kind]}", processes=1)
        norms = [norm for _, norm in losses(folder)]
        assert min(norms) < 0.65 < max(norms)  # some steps clip, some do not
        return folder

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "processes", "stages", "micro_batch"),
    [
        ("tied", 1, 1, 4),
        ("tied", 2, 2, 2),
        ("tied", 2, 2, 16),
        ("tied", 3, 3, 4),
        ("tied", 4, 2, 4),
        ("untied", 1, 1, 2),
        ("untied", 2, 2, 8),
        ("untied", 3, 3, 2),
        ("untied", 2, 1, 4),
        ("qwen2", 2, 2, 4),
    ],
)
def test_losses_and_gradient_norms_are_those_of_ddp(ddp, names, tmp_path, kind, processes, stages, micro_batch):
    """One to eight micro-batches. Prompt-masked rows: their target counts differ (test_data.py)."""
    settings = [f"model.name={names[kind]}", f"pipeline.stages={stages}", f"train.micro_batch_size={micro_batch}"]
    run(PROJECT, *SAME, *settings, f"output_dir={tmp_path}", processes=processes)
    ours, theirs = losses(tmp_path), losses(ddp(kind))
    assert ours[0][0] == pytest.approx(theirs[0][0], rel=1e-6)
    assert_close(ours, theirs, 1e-4)
    held_out, expected = (
        [r["eval_loss"] for r in metrics(folder) if "eval_loss" in r] for folder in (tmp_path, ddp(kind))
    )
    assert held_out == pytest.approx(expected, rel=1e-5) and len(held_out) == 2
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        exported = [AutoModelForCausalLM.from_pretrained(f / "model").eval()(ids).logits for f in (tmp_path, ddp(kind))]
    torch.testing.assert_close(*exported, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "relative"),
    [
        (["train.activation_checkpointing=true", "train.compile=true", "pipeline.partition=measured"], 1e-4),
        (["pipeline.partition=1,3", "data.packing=wrapped"], None),
        (["train.precision=bf16"], 2e-2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_options_train_alike(ddp, tmp_path, settings, relative):
    steps = 8
    settings = [*SAME, "model.name=tiny:llama", f"train.max_steps={steps}", *settings]
    run(PROJECT, *settings, f"output_dir={tmp_path / 'ours'}")
    if relative is None:  # other rows: DDP needs a run of its own
        theirs = [s for s in settings if not s.startswith("pipeline")]
        run("pytorch-ddp", *theirs, f"output_dir={tmp_path / 'theirs'}", processes=1)
        assert_close(losses(tmp_path / "ours"), losses(tmp_path / "theirs"), 1e-4)
    else:
        assert_close(losses(tmp_path / "ours"), losses(ddp("tied"))[:steps], relative)
    if "pipeline.partition=measured" in settings:
        grid = json.loads((tmp_path / "ours/environment.json").read_text())["pipeline"]
        costs = grid["measured_costs"]  # of this machine: tiny layers' times are nearly noise, but this much is sure
        assert 0 < costs["embedding"] < costs["head"] and costs["layer"] > 0 and sum(grid["layers_by_stage"]) == 4


# Started by a launcher: after the training each rank prints what it holds, and what it does not.
RANKS = """
import sys
sys.path[:0] = [sys.argv.pop(1)]
import torch, torch.distributed as dist
import train
from common.config import parse_config

train.GROUP_PARAMETERS = 50_000  # several groups, and unlike numbers of them by stage: 5 and 3

def tell(checkpoints, step, engine, model):
    local = {name: p for name, p in model.named_parameters() if not p.is_meta}
    masters = {
        piece.name: piece.of(engine.optimizer.single_partition_of_fp32_groups[piece.group]).detach().clone()
        for piece in train.pieces(engine.optimizer, model)
    }
    assert len(engine.optimizer.bit16_groups) == (5 if engine.is_first_stage() else 3)
    state = {"weights": {n: p.detach().clone() for n, p in local.items()}, "masters": masters}
    torch.save(state, f"{checkpoints.root.parent}/rank-{dist.get_rank()}.pt")

train.save_checkpoint = tell
train.train(parse_config(train.Config, train.__file__))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "processes"), [("fp32", 2), ("bf16", 2), ("fp32", 4)])
def test_tied_copies_stay_equal_and_each_rank_holds_its_stage_only(ddp, tmp_path, precision, processes):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": 50000}}')
    settings = [*SAME, "model.name=tiny:llama", "train.max_steps=50", f"train.precision={precision}"]
    settings += ["pipeline.stages=2", f"pipeline.ds_config={tmp_path}/ds.json", f"output_dir={tmp_path}/run"]
    done = subprocess.run(
        [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(script),
         str(REPOSITORY / PROJECT), "--config", "smoke.yaml", *settings],
        env=environment(DS_ACCELERATOR="cpu"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "run")) == 50
    if precision == "fp32":  # with more groups, too
        assert_close(losses(tmp_path / "run")[:30], losses(ddp("tied")), 1e-4)
    ranks = [torch.load(tmp_path / f"run/rank-{rank}.pt") for rank in range(processes)]
    first, last = ranks[0]["weights"], ranks[-1]["weights"]
    tied = "model.embed_tokens.weight"
    assert set(first) & set(last) == {tied}
    whole = dict(models.empty_model(ModelConfig("tiny:llama")).named_parameters())
    assert set(first) | set(last) == set(whole)
    start_value = models.load_model(ModelConfig("tiny:llama"), 42).get_parameter(tied)
    assert torch.equal(first[tied], last[tied]) and not torch.equal(first[tied].float(), start_value)
    # With two pipelines, a stage's masters are distributed, and only some ranks hold pieces of the embedding.
    half = processes // 2
    masters = [
        [rank["masters"][tied] for rank in stage if tied in rank["masters"]] for stage in (ranks[:half], ranks[half:])
    ]
    assert torch.equal(torch.cat(masters[0]), torch.cat(masters[1]))


# An epoch is 12 steps here: a run of 20 crosses into the second, in another order.
RESUME = [
    *SMOKE,
    "data.train_rows=144",
    "train.global_batch_size=12",
    "train.micro_batch_size=3",
    "train.max_steps=20",
    "train.learning_rate=1e-3",
    "checkpoint.every=4",
    "checkpoint.keep=6",
]


@pytest.fixture(scope="module")
def undisturbed():
    """The run of two stages that the others must equal, with all its checkpoints."""
    folder = finished_run(PROJECT, *RESUME, "tracking.backend=wandb")
    assert len(losses(folder)) == 20
    return folder


@pytest.mark.slow
def test_a_run_leaves_its_records(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["peak_gpu_gib_by_rank"] == [0.0, 0.0]  # CPU processes
    grid = json.loads((undisturbed / "environment.json").read_text())["pipeline"]
    assert grid.pop("computed_costs").keys() == {"embedding", "layer", "head"}
    assert grid == {"layers_by_stage": [3, 1], "pipelines": 1, "micro_batches": 4}
    saved = torch.load(undisturbed / "checkpoints/step-00000020/training.pt", weights_only=True)
    assert saved == {"steps": 20, "scaler": {}}  # in fp32 there is none
    (wandb_run,) = undisturbed.rglob("*.wandb")  # the main process's alone, though the loss is another's
    logged = history(read_wandb(wandb_run))
    assert [logged[step]["loss"] for step in range(1, 21)] == [loss for loss, _ in losses(undisturbed)]


@pytest.mark.slow
def test_a_stage_that_dies_ends_the_run(tmp_path):
    """The other stage waits for it in the middle of the schedule."""
    process = start(PROJECT, *SMOKE, "train.max_steps=5000", f"output_dir={tmp_path}")
    wait_for_step(process, tmp_path, 2)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    output = process.communicate(timeout=90)[0]
    assert process.returncode, output


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses_to_the_last_bit(undisturbed, tmp_path):
    settings = [*RESUME, f"output_dir={tmp_path}"]
    process = start(PROJECT, *settings, cold=True)
    kill_at_step(process, tmp_path, 14)
    output = run(PROJECT, *settings, cold=True)
    assert "Resuming from the checkpoint of step 12" in output
    assert curve(tmp_path) == curve(undisturbed)
    assert max(record["epoch"] for record in metrics(tmp_path) if "epoch" in record) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "stages"), [(1, 1), (3, 3), (4, 2)])
def test_a_checkpoint_of_two_stages_is_read_by_another_grid(undisturbed, tmp_path, processes, stages):
    resume = f"checkpoint.resume={undisturbed}/checkpoints/step-00000012"  # another run folder's, with its history
    settings = [resume, f"pipeline.stages={stages}", f"output_dir={tmp_path}"]
    output = run(PROJECT, *RESUME, *settings, processes=processes)
    assert "Resuming from the checkpoint of step 12" in output
    ours, theirs = ([loss for loss, _ in losses(folder)] for folder in (tmp_path, undisturbed))
    assert ours == pytest.approx(theirs, rel=1e-6) and len(ours) == 20
    if stages == 3:  # another cut between layers changes nothing at all
        assert ours == theirs


@pytest.mark.slow
def test_a_stopped_run_saves(tmp_path):
    process = start(PROJECT, *RESUME, "train.max_steps=200", "checkpoint.every=0", f"output_dir={tmp_path}", cold=True)
    wait_for_step(process, tmp_path, 7)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted" and 7 <= summary["steps"] < 200, output
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{summary['steps']:08d}"]
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_the_export_is_the_pipelines_model(undisturbed, tmp_path):
    """By the run and by export.py from its checkpoint, and against the losses that the pipeline gave."""
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    command = [PYTHON, f"{PROJECT}/export.py", "--config", "smoke.yaml", *RESUME]
    done = subprocess.run(
        [*command, "checkpoint.resume=never", f"output_dir={tmp_path}"],  # as the training was started, say
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and str(tmp_path / "model") in done.stdout, done.stderr
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        ours, theirs = (folder / "model" / name for folder in (tmp_path, undisturbed))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert "| optimizer steps | 20 |" in (tmp_path / "model/README.md").read_text()
    exported = AutoModelForCausalLM.from_pretrained(undisturbed / "model")
    assert {p.dtype for p in exported.parameters()} == {torch.float32}
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    done = subprocess.run(
        [PYTHON, f"{PROJECT}/eval.py", "--config", "smoke.yaml", *RESUME, f"output_dir={undisturbed}",
         "eval.samples=0", "eval.generate_rows=0"],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((undisturbed / "eval.json").read_text())
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert figures["base"]["loss"] == pytest.approx(summary["eval_loss_before"], rel=1e-7)
    assert figures["fine_tuned"]["loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-7)


# Each with the words that the one line must hold: the key or file, and what to set.
MISTAKES = {
    "misspelt key": (["pipeline.stage=2"], ["pipeline.stage", "pipeline.stages"]),
    "ranks and stages": (["pipeline.stages=2"], ["pipeline.stages=2", "1 processes", "set it to 1"]),
    "no numbers": (["pipeline.partition=most"], ["pipeline.partition=most", "measured, computed", "4 decoder layers"]),
    "layers that do not add up": (["pipeline.partition=3"], ["pipeline.partition=3", "4 decoder layers"]),
    "family": (["model.name=tiny:opt"], ["model.name=tiny:opt", "a opt model", "llama, qwen2"]),
    "global batch": (["train.global_batch_size=15"], ["train.global_batch_size=15", "14 or 16"]),
    "no DeepSpeed settings": (["pipeline.ds_config=nowhere.json"], ["pipeline.ds_config=nowhere.json"]),
    "no checkpoint": (["checkpoint.resume=runs/nowhere"], ["checkpoint.resume=runs/nowhere"]),
}


@pytest.mark.slow
def test_a_mistake_ends_in_one_line_that_names_it(tmp_path):
    """All at once: each start takes its time to import DeepSpeed."""
    running = {
        mistake: start(PROJECT, *SMOKE, f"output_dir={tmp_path / mistake.replace(' ', '-')}", *settings, processes=1)
        for mistake, (settings, _) in MISTAKES.items()
    }
    for mistake, process in running.items():
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 2, output
        line = error_line(output)
        assert all(word in line for word in MISTAKES[mistake][1]), line
        assert "Training:" not in output and not (tmp_path / mistake.replace(" ", "-") / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "settings", "words"),
    [
        (3, ["pipeline.stages=2"], ["pipeline.stages=2", "3 processes", "set it to 1 or 3"]),
        (4, ["train.global_batch_size=2", "pipeline.stages=2"], ["train.global_batch_size=2", "2 × 2", "4"]),
    ],
)
def test_several_processes_report_a_mistake_once(tmp_path, processes, settings, words):
    output = run(PROJECT, *SMOKE, f"output_dir={tmp_path}", *settings, processes=processes, exit_code=2)
    line = error_line(output)
    assert all(word in line for word in words), line


def test_a_batch_too_small_for_the_stages_is_told(modules, capsys):
    cfg = modules["train"].Config()
    cfg.train.global_batch_size, cfg.train.micro_batch_size = 16, 8
    warn = modules["stages"].warn_of_waiting
    warn(cfg, 3, 1, 2)
    warned = capsys.readouterr().err
    assert "too few micro-batches for 3 stages, 2" in warned and "50%" in warned
    assert (
        "train.micro_batch_size=4, or train.global_batch_size=24 or more" in warned
    )  # 16 rows are not a multiple of 5
    warn(cfg, 32, 1, 2)
    assert "micro_batch_size" not in (warned := capsys.readouterr().err) and "global_batch_size=256" in warned
    warn(cfg, 2, 1, 2)
    assert capsys.readouterr().err == ""


def llama(**changes):
    shape = models.load_model_config(ModelConfig("tiny:llama"))
    for name, value in changes.items():
        setattr(shape, name, value)
    return shape


LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256}  # fmt: skip


def test_the_partition_weighs_the_head_against_layers(modules):
    partition = modules["partition"]
    shape = llama(**LLAMA_1B)
    computed = {checkpointing: partition.computed_costs(shape, 512, checkpointing) for checkpointing in (False, True)}
    assert computed[False] == (0, pytest.approx(6 * 60817408, rel=0.05), 6 * 262668288)
    for costs, stages, expected in [
        (computed[False], 1, [16]),
        (computed[False], 2, [10, 6]),
        (computed[True], 2, [10, 6]),
        (computed[True], 4, [5, 5, 5, 1]),
        (computed[False], 16, [1] * 16),
        (partition.Costs(embedding=0.4, layer=4.7, head=4.4), 2, [8, 8]),
        (partition.Costs(embedding=2.5, layer=1.0, head=0.5), 4, [2, 5, 5, 4]),
    ]:
        found, by = partition.layers_by_stage(shape, "computed", stages, lambda costs=costs: costs)
        assert found == expected and by == (costs if stages > 1 else None)
    assert partition.layers_by_stage(shape, "9,7", 2, None) == ([9, 7], None)
    for wrong in ("9,6", "16", "17,-1", "16,0", "8,8,0", "8;8", "²,14", ""):
        with refused(f"pipeline.partition={wrong}", "2 whole numbers", "16 decoder layers"):
            partition.layers_by_stage(shape, wrong, 2, None)
    with refused("pipeline.stages=5", "4 decoder layers", "4 or less"):
        partition.layers_by_stage(llama(), "measured", 5, None)


def test_a_model_that_cannot_be_cut_is_refused(modules):
    check = modules["stages"].check_family
    for family in ("llama", "qwen2"):
        check(models.load_model_config(ModelConfig(f"tiny:{family}")), family)
    for family in ("opt", "bloom"):
        with refused("model.name=it", family, "llama, qwen2"):
            check(models.load_model_config(ModelConfig(f"tiny:{family}")), "it")
    qwen = models.load_model_config(ModelConfig("tiny:qwen2"))
    qwen.use_sliding_window = True
    with refused("model.name=it", "sliding window"):
        check(qwen, "it")


@pytest.mark.parametrize("attention", [None, "eager"])
def test_no_layer_sees_a_later_token_whatever_attention_config_json_asks_for(modules, untied, tmp_path, attention):
    """Stages call their layers without a mask: the loss of all layers in a row is the plain model's."""
    shutil.copytree(untied, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": attention}))
    plain = models.load_model(ModelConfig(untied))
    generator = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():  # far from zero: attention counts
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model = models.empty_model(ModelConfig(str(tmp_path)))
    layers = [spec.build() for spec in modules["stages"].decoder_specs(model, torch.device("cpu"))]
    model.load_state_dict(plain.state_dict())
    ids = torch.randint(3, 2048, (2, 32), generator=generator)
    hidden = ids
    with torch.no_grad():
        for layer in layers:
            hidden = layer(hidden)
        ours = token_losses(hidden, model.get_output_embeddings().weight, ids) / (2 * 31)
        theirs = plain(ids, labels=ids).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


DS = {"zero_optimization": {"stage": 1}}
BAD_DS_CONFIGS = {
    "global batch": ({**DS, "train_batch_size": 32}, ["train_batch_size", "train.global_batch_size"]),
    "stages": ({**DS, "pipeline": {"stages": 2}}, ["pipeline", "pipeline.stages"]),
    "optimizer": ({**DS, "optimizer": {"type": "AdamW"}}, ["optimizer", "train.learning_rate"]),
    "timers": ({**DS, "wall_clock_breakdown": True}, ["wall_clock_breakdown", "steps_per_print"]),
    "misspelt key": ({"zero_optimization": {"stag": 1}}, ["zero_optimization.stag", "zero_optimization.stage"]),
    "offload": ({"zero_optimization": {"stage": 1, "offload_optimizer": {}}}, ["offload_optimizer", "this project"]),
    "other stage": ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage is 2", "set it to 1"]),
    "no stage": ({}, ["zero_optimization.stage is not set", "set it to 1"]),
}


@pytest.mark.parametrize("mistake", BAD_DS_CONFIGS)
def test_a_wrong_ds_config_is_refused_with_the_key_and_what_to_set(modules, tmp_path, mistake):
    settings, words = BAD_DS_CONFIGS[mistake]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    with refused("ds.json", *words):
        modules["ds_settings"].read_ds_config(str(path), tmp_path)


def test_the_shipped_files_are_accepted(modules):
    for name in ("config.yaml", "smoke.yaml"):
        cfg = load_config(modules["train"].Config, REPOSITORY / PROJECT / name, [])
        settings = modules["ds_settings"].read_ds_config(cfg.pipeline.ds_config, REPOSITORY / PROJECT)
        assert settings["zero_optimization"]["stage"] == 1
