"""llm-foundry-finetune by its launch.sh, in its own environment: equality with DDP, resume, export, failures."""

import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import time

import pytest
import torch
import yaml
from conftest import REPOSITORY
from datasets import Dataset
from families import tiny_config
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
    made_once,
    metrics,
    output_of,
    project_modules,
    run,
    run_on_two_machines,
    start,
    wait_for_step,
)
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM
from wandb_log import config, history, read_wandb

from bench import plain_loop
from common import data, models
from common.config import BaseConfig, ModelConfig, load_config

PROJECT = "llm-foundry-finetune"
# An epoch is 12 steps here: a run of 30 crosses three of them. 17 held-out rows are unequal shares for two ranks.
RUN = [
    *SMOKE,
    "data.eval_rows=17",
    "data.train_rows=200",
    "train.max_steps=30",
    "train.learning_rate=1e-3",
    "train.warmup_steps=4",
    "train.weight_decay=0.1",
    "eval.every=10",
    "checkpoint.every=5",
    "checkpoint.keep=2",
]


@pytest.fixture(scope="module", autouse=True)
def environment_is_built(request):
    """The first start of launch.sh would build it, within that test's patience. Quick tests need none."""
    if any(test.get_closest_marker("slow") for test in request.session.items if test.path == request.path):
        subprocess.run([f"{PROJECT}/build_environment.sh"], cwd=REPOSITORY, check=True)


def write_model(name: str, folder) -> str:
    """A model folder: the two environments' embedded models start from other random weights."""
    models.load_model(ModelConfig(name), seed=1).save_pretrained(folder)
    models.load_tokenizer(ModelConfig(name)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base() -> str:
    return str(made_once("foundry-base", lambda folder: write_model("tiny:opt", folder)))


@pytest.fixture(scope="module")
def undisturbed(base):
    """The run that the others must equal."""
    folder = finished_run(PROJECT, *RUN, f"model.name={base}")
    assert "Traceback" not in output_of(folder) and output_of(folder).count("Step 0: held-out loss") == 1
    return folder


def held_out(folder) -> list[float]:
    return [record["eval_loss"] for record in metrics(folder) if "eval_loss" in record]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_ddp_does(undisturbed, base, tmp_path):
    """With warm-up, cosine schedule, weight decay, clipping, prompts masked, several epochs."""
    run("pytorch-ddp", *RUN, f"model.name={base}", f"output_dir={tmp_path}", processes=1)
    assert len(losses(undisturbed)) == 30
    ours, theirs = losses(undisturbed), losses(tmp_path)
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], rel=1e-5)
    # OPT's key biases have no gradient but rounding errors, of which Adam makes whole steps.
    assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in theirs], rel=1e-3)
    assert held_out(undisturbed) == pytest.approx(held_out(tmp_path), rel=1e-6)
    for name in ("epoch", "learning_rate", "tokens"):
        ours, theirs = ([r[name] for r in metrics(folder) if "loss" in r] for folder in (undisturbed, tmp_path))
        assert ours == pytest.approx(theirs, rel=1e-12), name


@pytest.mark.slow
def test_two_machines_that_share_their_disk_train_as_one(undisturbed, base, tmp_path):
    run_on_two_machines(PROJECT, *RUN, f"model.name={base}", f"output_dir={tmp_path}")
    assert curve(tmp_path) == curve(undisturbed)


@pytest.mark.slow
def test_one_process_trains_as_ddp_does(tmp_path):
    """In a folder that `datasets` would take for a pattern, with tokens across the border of prompt and response."""
    base = write_model("tiny:llama", tmp_path / "base")
    settings = [*SMOKE, "train.max_steps=20", "train.learning_rate=1e-3", "train.lr_schedule=constant"]
    settings += ["data.prompt_template={prompt} "]
    settings += ["train.warmup_steps=0", f"model.name={base}", "train.activation_checkpointing=true"]
    run(PROJECT, *settings, f"output_dir={tmp_path}/foundry[1]", processes=1)
    run("pytorch-ddp", *settings, f"output_dir={tmp_path}/ddp", processes=1)
    assert len(losses(tmp_path / "foundry[1]")) == 20
    assert_close(losses(tmp_path / "foundry[1]"), losses(tmp_path / "ddp"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "processes", "options"),
    [("opt", 2, []), ("bloom", 1, ["train.activation_checkpointing=true"]), ("qwen2", 2, [])],
)
def test_packed_documents_train_as_a_plain_loop_trains_them_unpacked(tmp_path, family, processes, options):
    settings = [*EQUAL, "data.packing=documents", "train.max_steps=8", "data.train_rows=600"]
    settings.append(f"model.name={write_model(f'tiny:{family}', tmp_path / 'base')}")
    expected = plain_loop.train(REPOSITORY / "pytorch-ddp/smoke.yaml", settings)
    run(PROJECT, *settings, *options, f"output_dir={tmp_path / 'run'}", processes=processes)
    found = [r for r in metrics(tmp_path / "run") if "loss" in r]
    assert [r["loss"] for r in found] == pytest.approx(expected["losses"], rel=1e-5)
    assert [r["grad_norm"] for r in found] == pytest.approx(expected["grad_norms"], rel=1e-4)
    cfg = load_config(BaseConfig, REPOSITORY / "pytorch-ddp/smoke.yaml", settings)
    rows, _ = data.tokenized_rows(cfg.data, cfg.seed, models.load_tokenizer(cfg.model))
    assert [r["tokens"] for r in found] == [step.tokens for step in data.step_loader(rows, cfg, 0, 0, 1)]
    assert held_out(tmp_path / "run")[-1] == pytest.approx(expected["eval_loss_after"], rel=1e-5)
    rows = json.loads((tmp_path / "run/summary.json").read_text())["data"]["training"]
    assert rows["filled"] > 0.95 and rows["blocks"] < rows["kept"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses(undisturbed, base, tmp_path):
    settings = [*RUN, f"model.name={base}", f"output_dir={tmp_path}"]
    process = start(PROJECT, *settings, cold=True)
    kill_at_step(process, tmp_path, 18)
    output = run(PROJECT, *settings)
    assert "Resuming from the checkpoint of step" in output
    assert curve(tmp_path) == curve(undisturbed)


@pytest.mark.slow
def test_a_completed_run_trains_on_as_if_it_had_not_ended(tmp_path):
    """With two processes and packed rows."""
    settings = [*SMOKE, "data.train_rows=80", "train.learning_rate=1e-3", "train.lr_schedule=constant", "eval.every=4"]
    settings += ["train.warmup_steps=0", "foundry.packing_ratio=1.5"]
    run(PROJECT, *settings, "train.max_steps=8", f"output_dir={tmp_path}/at-once")
    run(PROJECT, *settings, "train.max_steps=4", f"output_dir={tmp_path}/in-two")
    output = run(PROJECT, *settings, "train.max_steps=8", f"output_dir={tmp_path}/in-two")
    assert "Resuming from the checkpoint of step 4" in output
    assert len(losses(tmp_path / "at-once")) == 8 and curve(tmp_path / "in-two") == curve(tmp_path / "at-once")


@pytest.mark.slow
def test_a_stop_in_the_last_step_does_not_take_the_evaluation(tmp_path):
    settings = ["data.train_rows=50", "train.max_steps=1", "train.warmup_steps=0", "eval.every=2"]
    run(PROJECT, *SMOKE, *settings, "runtime.max_hours=0.000001", f"output_dir={tmp_path}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert [record["step"] for record in metrics(tmp_path) if "eval_loss" in record] == [0, 1]
    assert summary["eval_loss_after"] == held_out(tmp_path)[1] != held_out(tmp_path)[0]


@pytest.mark.slow
def test_a_refused_start_leaves_the_earlier_run_as_it_was(undisturbed, base, tmp_path):
    def files() -> dict:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    before = files()
    output = run(PROJECT, *RUN, f"model.name={base}", f"output_dir={folder}", "seed=7", exit_code=2)
    assert "seed is 7" in error_line(output) and "checkpoint.resume=never" in error_line(output)
    assert files() == before


@pytest.mark.slow
def test_a_model_without_fused_attention_learns_dates_as_ddp_does(tmp_path):
    """BLOOM has no `sdpa`; dates are strings, whatever a reader of JSON would make of them, and U+2028 ends no line."""
    shape = BloomConfig(vocab_size=models.TINY_VOCABULARY, hidden_size=64, n_layer=2, n_head=4)
    BloomForCausalLM(shape).save_pretrained(tmp_path / "base")
    models.load_tokenizer(ModelConfig("tiny:opt")).save_pretrained(tmp_path / "base")
    rows = {
        "prompt": [f"Day {i}\u2028is" for i in range(60)],
        "response": [f"2024-{i % 12 + 1:02}-17" for i in range(60)],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    settings = [*SMOKE, f"model.name={tmp_path}/base", f"data.name={tmp_path}/rows.parquet", "train.max_steps=4"]
    settings += ["train.learning_rate=1e-3", "train.warmup_steps=0", "train.lr_schedule=constant"]
    run(PROJECT, *settings, f"output_dir={tmp_path}/foundry")
    run("pytorch-ddp", *settings, f"output_dir={tmp_path}/ddp", processes=1)
    assert len(losses(tmp_path / "foundry")) == 4
    assert_close(losses(tmp_path / "foundry"), losses(tmp_path / "ddp"), 1e-4)
    assert held_out(tmp_path / "foundry") == pytest.approx(held_out(tmp_path / "ddp"), rel=1e-5)


@pytest.mark.slow
def test_a_stopped_run_saves_and_a_damaged_checkpoint_is_passed_over(undisturbed, base, tmp_path):
    settings = [*RUN, f"model.name={base}", f"output_dir={tmp_path}"]
    process = start(PROJECT, *settings, cold=True)
    wait_for_step(process, tmp_path, 12)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted" and 12 <= summary["steps"] < 30, output
    assert "Traceback" not in output and process.returncode == 128 + signal.SIGTERM
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(found) == 2 and found[-1] == f"step-{summary['steps']:08d}"
    assert not (tmp_path / "model").exists()

    (shard,) = (tmp_path / "checkpoints" / found[-1]).rglob("__1_0.distcp")  # each rank wrote its own
    shard.write_bytes(shard.read_bytes()[:-100])
    output = run(PROJECT, *settings)
    assert f"{found[-1]} is damaged" in output
    assert f"Resuming from the checkpoint of step {int(found[0].removeprefix('step-'))}" in output
    assert curve(tmp_path) == curve(undisturbed)


@pytest.mark.slow
def test_the_export_is_the_trained_model_and_a_finished_run_says_so(undisturbed, base, tmp_path):
    """Read by this environment's transformers: the loss of the export is that which the sharded model had."""
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["project"] == PROJECT and summary["steps"] == 30
    assert json.loads((undisturbed / "environment.json").read_text())["versions"]["llm-foundry"] == "0.22.0"
    assert (undisturbed / "plots/loss.png").exists() and not (undisturbed / "foundry/cache").exists()
    written = json.loads((undisturbed / "model/config.json").read_text())
    assert written["architectures"] == ["OPTForCausalLM"] and str(base) not in json.dumps(written)
    done = subprocess.run(
        [PYTHON, f"{PROJECT}/eval.py", "--config", "smoke.yaml", *RUN, f"model.name={base}",
         f"output_dir={undisturbed}", "eval.samples=0", "eval.generate_rows=0"],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((undisturbed / "eval.json").read_text())
    assert figures["base"]["loss"] == pytest.approx(summary["eval_loss_before"], rel=1e-6)
    assert figures["fine_tuned"]["loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-6)

    # The same logits as the weights in the checkpoint, which are read without Composer and FSDP.
    shutil.copytree(undisturbed, tmp_path / "run")
    (shards,) = (tmp_path / "run/checkpoints/step-00000030/composer").iterdir()
    script = (
        "import sys; from torch.distributed.checkpoint.format_utils import dcp_to_torch_save; "
        "dcp_to_torch_save(*sys.argv[1:])"
    )
    python = REPOSITORY / ".venv-foundry/bin/python"
    subprocess.run([python, "-c", script, str(shards), str(tmp_path / "whole.pt")], check=True, capture_output=True)
    state = torch.load(tmp_path / "whole.pt", weights_only=False)["state"]["model"]
    trained = AutoModelForCausalLM.from_pretrained(base)
    trained.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(undisturbed / "model").eval()(ids).logits
        assert torch.equal(exported, trained.eval()(ids).logits)

    before = curve(tmp_path / "run")
    output = run(PROJECT, *RUN, f"model.name={base}", f"output_dir={tmp_path}/run")
    assert "This run is complete: step 30 of 30" in output and curve(tmp_path / "run") == before


@pytest.mark.slow
def test_packed_rows_wandb_and_the_time_limit(tmp_path):
    settings = ["data.eval_rows=16", "train.max_steps=6", "train.warmup_steps=0", "eval.every=0"]
    settings += ["foundry.packing_ratio=1.5", "train.activation_checkpointing=true", f"output_dir={tmp_path}/run"]
    output = run(PROJECT, *settings)
    assert "wandb sync" in output
    steps = [record for record in metrics(tmp_path / "run") if "loss" in record]
    assert len(steps) == 6 and steps[-1]["loss"] < steps[0]["loss"]
    # 24 rows in 16 sequences, in each step; what does not fit in a step goes into one of the next.
    lines = (tmp_path / "run/foundry/train.jsonl").read_text().splitlines()
    assert len(lines) == 6 * 24
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    records = read_wandb(file)
    assert [history(records)[step]["loss"] for step in range(1, 7)] == [record["loss"] for record in steps]
    assert config(records)["foundry.packing_ratio"] == 1.5

    # Offline by W&B's own variable now, which 0.18 overlooks.
    output = run(PROJECT, *settings, "train.max_steps=500", "runtime.max_hours=0.0001", WANDB_MODE="offline")
    assert "warning" not in output and len([*(tmp_path / "run").glob("wandb/offline-run-*/*.wandb")]) == 2
    assert "Resuming from the checkpoint of step 6" in output and "runtime.max_hours=0.0001 is over" in output
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["steps"] == 7


def test_the_file_has_the_rows_of_each_step_in_order(tmp_path):
    """Foundry's sampler deals rows r, r + 2 ... to rank r of two: those that it has in the other projects."""
    with project_modules(PROJECT, "settings", "prepare_data") as modules:
        cfg = load_config(modules["settings"].Config, REPOSITORY / PROJECT / "smoke.yaml", ["data.train_rows=100"])
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, max_steps=9))
        tokenizer = models.load_tokenizer(cfg.model)
        prepared = modules["prepare_data"].prepare(cfg, tokenizer, tmp_path, world_size=2)
    lines = [json.loads(line) for line in prepared.train_file.read_text().splitlines()]
    training, _ = data.load_rows(cfg.data, cfg.seed)
    rows = data.tokenize(training, cfg.data, tokenizer)
    assert prepared.total_steps == 9 and prepared.steps_per_epoch == 6 and len(lines) == prepared.rows == 9 * 16
    for rank in range(2):
        expected = [i for step in data.StepSampler(rows, cfg, rank, 2) for i in step]
        ours = lines[rank::2]
        assert [line["response"] for line in ours] == [training[i]["response"] for i in expected]
        assert all(line["prompt"] == training[i]["prompt"] + "\n" for line, i in zip(ours, expected, strict=True))
    held_out = [json.loads(line)["prompt"] for line in prepared.eval_file.read_text().splitlines()]
    assert len(held_out) == prepared.eval_rows == 200 and not {line["prompt"] for line in lines} & set(held_out)


def test_foundry_gets_the_rows_and_tokens_of_the_other_projects(tmp_path):
    """Tokens across the border of prompt and response, the template's EOS, an empty response, and what is left out."""
    rows = [{"prompt": f"question {i}: ", "response": f"answer {i}"} for i in range(60)]
    rows += [{"prompt": "nothing follows", "response": ""}, {"prompt": "long " * 500, "response": "no room"}]
    file = tmp_path / "rows[1].jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows1.jsonl").write_text(json.dumps({"prompt": "another", "response": "file"}) + "\n")
    settings = [f"data.name={file}", "data.eval_rows=5", "train.global_batch_size=1"]
    with project_modules(PROJECT, "settings", "prepare_data") as modules:
        read_line, tokens_of_line = modules["prepare_data"].read_line, modules["prepare_data"].tokens_of_line
        for template in ("{prompt}", "{prompt}<|endoftext|>"):
            more = [f'data.prompt_template="{template}"']
            cfg = load_config(modules["settings"].Config, REPOSITORY / PROJECT / "smoke.yaml", settings + more)
            tokenizer = models.load_tokenizer(cfg.model)
            prepared = modules["prepare_data"].prepare(cfg, tokenizer, tmp_path, world_size=1)
            training, held_out = data.tokenized_rows(cfg.data, cfg.seed, tokenizer)
            assert prepared.counts == training.counts
            dropped = [part["dropped"] for part in prepared.counts.values()]
            assert {"its prompt is longer than data.max_length=128": 1} in dropped and {} in dropped
            order = [i for step in data.StepSampler(training, cfg, 0, 1) for i in step]
            assert prepared.rows == len(order) == prepared.total_steps
            for path, tokens in (
                (prepared.train_file, [training[i] for i in order]),
                (prepared.eval_file, [*held_out]),
            ):
                lines = path.read_text().splitlines()
                assert len(lines) == len(tokens)
                for line, row in zip(lines, tokens, strict=True):
                    (turn,) = tokens_of_line(read_line({"text": line}), tokenizer)["turns"]
                    assert turn["input_ids"] + turn["labels"] == row["input_ids"].tolist()
                    assert turn["labels"] == row["labels"][row["labels"] != data.IGNORE].tolist()


# Started in LLM Foundry's environment: each mistake in turn, since importing it takes ten seconds.
MISTAKES = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import train
from common.config import parse_config
from common.errors import UserError
for name, settings in json.loads(sys.argv[2]).items():
    try:
        train.train(parse_config(train.Config, train.__file__, ["--config", "smoke.yaml", *settings]))
        print(json.dumps([name, "no error"]))
    except UserError as error:
        print("\\n" + json.dumps([name, str(error)]), flush=True)
"""


# As a launcher sets it: the group that the first of them joins is still there for the next one.
GROUP_OF_ONE = dict.fromkeys(("RANK", "LOCAL_RANK", "NODE_RANK"), "0") | {
    "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"
}  # fmt: skip


# What config.yaml owns, as a file of one's own might have it.
OTHERWISE = {
    "max_seq_len": 64,
    "model.pretrained_model_name_or_path": "facebook/opt-125m",
    "model.pretrained": False,
    "tokenizer.name": "facebook/opt-125m",
    "tokenizer.kwargs.model_max_length": 64,
    "train_loader.dataset.hf_kwargs.data_files": "other.jsonl",
    "train_loader.dataset.max_seq_len": 64,
    "train_loader.dataset.packing_ratio": 3.0,
    "eval_loader.dataset.hf_kwargs.data_files": "other.jsonl",
    "eval_loader.dataset.max_seq_len": 64,
    "global_train_batch_size": 8,
    "device_train_microbatch_size": 1,
    "device_eval_batch_size": 1,
    "optimizer.lr": 3.0e-4,
    "optimizer.weight_decay": 0.1,
    "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"},
    "max_duration": "2ep",
    "eval_interval": "50ba",
    "seed": 7,
    "precision": "amp_bf16",
    "dist_timeout": 5,
    "fsdp_config.activation_checkpointing": True,
    "load_path": "elsewhere",
    "train_loader.dataset.target_responses": "first",
    "callbacks.gradient_norm.max_norm": 0.5,
}


@pytest.mark.slow
def test_a_mistake_is_one_line_that_names_it(tmp_path):
    ours = (REPOSITORY / PROJECT / "foundry.yaml").read_text()
    files = {
        "misspelt": ours.replace("max_duration:", "max_durations:"),
        "interpolation": ours.replace("variables.train.learning_rate", "variables.train.learning"),
        "option": ours.replace("eps: 1.0e-08", "epsilon: 1.0e-08"),
        "optimizer": ours.replace("name: decoupled_adamw", "name: adam"),
        "yaml": "model: {",
        "callback": ours.replace("  run_folder: {}", "  lr_monitor: {}"),
        "callbacks": ours[: ours.index("callbacks:")] + "callbacks: []",
        "variables": "variables: []\n" + ours[ours.index("max_seq_len:") :],
    }
    for name, other in OTHERWISE.items():
        settings = yaml.safe_load(ours)
        *sections, key = name.split(".")
        section = functools.reduce(dict.__getitem__, sections, settings)
        assert "${" in str(section[key])
        section[key] = other
        files[name] = yaml.safe_dump(settings)
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    tokenizer, mamba = models.load_tokenizer(ModelConfig("tiny:opt")), tiny_config("mamba")
    mamba.vocab_size = len(tokenizer)
    for part in (mamba, tokenizer):
        part.save_pretrained(tmp_path / "mamba")
    mistakes = {
        "misspelt key": (["foundry.packing_rato=2"], ["foundry.packing_rato", "foundry.packing_ratio"]),
        "wrong type": (["foundry.packing_ratio=much"], ["foundry.packing_ratio", "much"]),
        "too small": (["foundry.packing_ratio=0.5"], ["foundry.packing_ratio=0.5"]),
        "format": (["data.format=text"], ["data.format=text", "prompt-response", "pytorch-fsdp"]),
        "packing": (["data.packing=wrapped"], ["data.packing=wrapped", "documents", "none"]),
        "packed twice": (
            ["data.packing=documents", "foundry.packing_ratio=2"],
            ["foundry.packing_ratio=2", "data.packing=documents", "foundry.packing_ratio=1"],
        ),
        "packed family": (["data.packing=documents", f"model.name={tmp_path}/mamba"], ["documents", "Mamba"]),
        "precision": (["train.precision=bf16"], ["train.precision=bf16", "auto"]),
        "compile": (["train.compile=true"], ["train.compile=true", "false"]),
        "global batch": (["train.global_batch_size=18"], ["train.global_batch_size=18", "16 or 20"]),
        "missing column": (["data.prompt_column=question"], ["data.prompt_column=question", "prompt, response"]),
        "no data file": ([f"data.name={tmp_path}/none.jsonl"], ["none.jsonl", "no such file"]),
        "no model": (["model.name=./nowhere"], ["model.name", "nowhere"]),
        "no checkpoint": (["checkpoint.resume=runs/nowhere"], ["checkpoint.resume=runs/nowhere"]),
        "output folder": (["output_dir=/proc/nowhere"], ["output_dir=/proc/nowhere"]),
        "no foundry file": (["foundry.file=none.yaml"], ["foundry.file=none.yaml", "no such file"]),
        "foundry misspelt": (
            [f"foundry.file={tmp_path}/misspelt.yaml"],
            ["max_durations", "did you mean max_duration"],
        ),
        "foundry interpolation": (
            [f"foundry.file={tmp_path}/interpolation.yaml"],
            ["interpolation.yaml", "optimizer.lr"],
        ),
        "foundry option": ([f"foundry.file={tmp_path}/option.yaml"], ["option.yaml", "epsilon"]),
        "foundry optimizer": ([f"foundry.file={tmp_path}/optimizer.yaml"], ["optimizer.yaml", "adam"]),
        "foundry yaml": ([f"foundry.file={tmp_path}/yaml.yaml"], ["yaml.yaml:"]),
        "foundry callback": ([f"foundry.file={tmp_path}/callback.yaml"], ["callbacks.run_folder is missing"]),
        "foundry callbacks": (
            [f"foundry.file={tmp_path}/callbacks.yaml"],
            ["callbacks.yaml: callbacks.gradient_norm is missing"],
        ),
        "foundry variables": ([f"foundry.file={tmp_path}/variables.yaml"], ["variables.yaml: variables: "]),
    }
    for name in OTHERWISE:
        mistakes[f"owned {name}"] = (
            [f"foundry.file={tmp_path}/{name}.yaml"],
            [f"{name} is ", "config.yaml owns it", "write ${"],
        )
    common = [*SMOKE, "train.max_steps=1", "data.train_rows=50", f"output_dir={tmp_path}/run"]
    done = subprocess.run(
        [REPOSITORY / ".venv-foundry/bin/python", "-c", MISTAKES, str(REPOSITORY / PROJECT),
         json.dumps({name: [*common, *settings] for name, (settings, _) in mistakes.items()})],
        cwd=REPOSITORY, env=environment(**GROUP_OF_ONE), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert found.keys() == mistakes.keys(), done.stdout + done.stderr
    wrong = {
        name: line for name, line in found.items() if "\n" in line or any(w not in line for w in mistakes[name][1])
    }
    assert not wrong
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.slow
def test_two_processes_report_a_mistake_once(tmp_path):
    # Only rank 0 looks at the data: the other rank meets it as a lost connection, and must not report that.
    output = run(PROJECT, *SMOKE, f"output_dir={tmp_path}", "data.prompt_column=question", exit_code=2)
    assert "data.prompt_column=question" in error_line(output)
    assert output.count("question") == 1


def without_pythonpath() -> dict[str, str]:
    return {name: value for name, value in environment().items() if name != "PYTHONPATH"}


@pytest.mark.slow
def test_the_data_can_be_written_by_hand(tmp_path):
    """As the README has it: by that environment's Python and nothing else."""
    command = [".venv-foundry/bin/python", f"{PROJECT}/prepare_data.py", "--config", "smoke.yaml"]
    command += ["data.train_rows=50", "data.eval_rows=9", "train.max_steps=3", f"output_dir={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=without_pythonpath(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "48 rows, 3 steps" in done.stdout and "9 rows, held out" in done.stdout
    lines = {name: (tmp_path / f"foundry/{name}.jsonl").read_text().splitlines() for name in ("train", "eval")}
    assert (len(lines["train"]), len(lines["eval"])) == (48, 9)


def a_repository(folder, requirements: str):
    """build_environment.sh when it builds another, small environment."""
    (folder / PROJECT).mkdir(parents=True)
    (folder / "launchers").mkdir()
    for script in (f"{PROJECT}/build_environment.sh", "launchers/new_environment.sh"):
        shutil.copy(REPOSITORY / script, folder / script)
    (folder / PROJECT / "requirements.txt").write_text(requirements)
    return subprocess.Popen, {
        "args": [folder / PROJECT / "build_environment.sh"],
        "env": environment(PIP_NO_INDEX="1"),
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


@pytest.mark.slow
def test_an_environment_that_cannot_be_built_is_told_with_pips_line(tmp_path):
    build, options = a_repository(tmp_path, "pip\nno-such-framework==0.22.0\n")
    process = build(**options)
    line = error_line(process.communicate(timeout=300)[0])
    assert process.returncode == 2
    assert "No matching distribution found for no-such-framework==0.22.0" in line and "build.log" in line
    assert not (tmp_path / ".venv-foundry/ready").exists()


@pytest.mark.slow
def test_two_starts_build_the_environment_once(tmp_path):
    build, options = a_repository(tmp_path, "pip\n")
    first = build(**options)
    lock = tmp_path / ".venv-foundry/build.log"
    deadline = time.monotonic() + 120
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = build(**options)
    outputs = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert "Building .venv-foundry" in outputs[0] and "Building" not in outputs[1]
    assert (tmp_path / ".venv-foundry/ready").exists()
    (tmp_path / "common.py").touch()
    python = tmp_path / ".venv-foundry/bin/python"
    subprocess.run([python, "-c", "import common"], cwd="/", env=without_pythonpath(), check=True)
    third = build(**options)
    assert third.communicate(timeout=60)[0] == "" and third.returncode == 0
    (tmp_path / PROJECT / "requirements.txt").write_text("pip\nno-such-framework\n")  # newer than the stamp: update
    fourth = build(**options)
    fourth.communicate(timeout=300)
    assert fourth.returncode == 2
