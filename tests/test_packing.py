"""`data.packing=documents`: a block's loss, gradients and logits are those of its documents, each by itself."""

import functools
import json
import subprocess

import datasets
import numpy as np
import pytest
import torch
from conftest import FAMILIES, REPOSITORY, refused
from families import tiny_config
from launching import EQUAL, PYTHON, assert_close, environment, error_line, losses, run
from transformers import AutoConfig

from bench import plain_loop
from common import data, evaluation, models
from common.config import BaseConfig, DataConfig, ModelConfig, TrainConfig
from common.document_attention import check_documents, document_inputs, document_mask
from common.loss import IGNORE, CausalLMLoss, count_targets
from common.packing import best_fit_decreasing, documents_of, pack_documents

SIZE = 24
# One-token documents next to each other, at a block's begin and end; a document of the whole block; all cuts between.
LENGTHS = [1, 1, 24, 23, 1, 2, 22, 5, 7, 12, 1, 1, 3, 20, 9, 15]


@pytest.fixture(scope="module")
def documents() -> list[dict[str, torch.Tensor]]:
    """Rows of all `LENGTHS`, in some of which a prompt is masked."""
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(3, 2048, (length,), generator=generator)} for length in LENGTHS]
    for row in rows:
        row["labels"] = row["input_ids"].clone()
        row["labels"][: len(row["labels"]) // 3] = IGNORE
    return rows


def blocks_of(documents: list[dict[str, torch.Tensor]], size: int = SIZE) -> data.TokenizedRows:
    tokens, labels = (torch.cat([row[name] for row in documents]).numpy() for name in ("input_ids", "labels"))
    offsets = np.cumsum([0, *(len(row["labels"]) for row in documents)])
    packed = pack_documents(tokens, labels, offsets, size)
    return data.TokenizedRows(packed.tokens, packed.labels, packed.offsets, positions=packed.positions)


def lively(family: str) -> torch.nn.Module:
    """A tiny model whose attention and positions count."""
    model = models.load_model(ModelConfig(f"tiny:{family}")).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3)
    return model


# --- blocks ---------------------------------------------------------------------------------------------------------


def reference_blocks(lengths: list[int], size: int) -> int:
    """Best-fit decreasing as it is defined: the fullest of all blocks that has room."""
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, taken in enumerate(filled) if taken + length <= size]
        if fitting:
            filled[max(fitting, key=lambda i: filled[i])] += length
        else:
            filled.append(length)
    return len(filled)


@pytest.mark.parametrize("longest", [8, 64, 200])
def test_as_few_blocks_as_best_fit_decreasing_and_every_document_in_one(longest):
    lengths = np.random.default_rng(longest).integers(1, longest + 1, 500)
    blocks = best_fit_decreasing(lengths, 200)
    assert len(blocks) == reference_blocks(lengths.tolist(), 200)
    assert sorted(i for block in blocks for i in block) == list(range(500))
    assert max(lengths[block].sum() for block in blocks) <= 200


def test_blocks_are_the_documents_with_positions_that_restart(documents):
    blocks = blocks_of(documents)
    found = [document for block in blocks for document in documents_of(block)]
    expected = {tuple(row["input_ids"].tolist()): row["labels"] for row in documents}
    assert len(found) == len(documents)
    for document in found:
        labels = expected.pop(tuple(document["input_ids"].tolist()))
        assert document["labels"][0] == IGNORE and torch.equal(document["labels"][1:], labels[1:])
    assert sum(count_targets(row["labels"][None]) for row in documents) == sum(
        count_targets(block["labels"][None]) for block in blocks
    )
    assert all(block["position_ids"][0] == 0 for block in blocks)


def settings(**options) -> DataConfig:
    return DataConfig(format="prompt-response", max_length=64, packing="documents", **options)


def made_rows(count: int = 40) -> datasets.Dataset:
    words = [{"prompt": f"Say {i}", "response": "word " * (i * 7 % 50)} for i in range(count)]
    return datasets.Dataset.from_list([*words, {"prompt": "word " * 80, "response": "x"}])


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_the_rows_that_are_not_packed(family):
    """The same tokens, EOS, masks and cuts, and the same account of what was dropped and cut."""
    tokenizer = models.load_tokenizer(ModelConfig(f"tiny:{family}"))
    blocks, rows = (data.tokenize(made_rows(), settings(), tokenizer, packing=p) for p in ("documents", "none"))
    found = sorted(d["input_ids"].tolist() for block in blocks for d in documents_of(block))
    assert found == sorted(row["input_ids"].tolist() for row in rows)
    places = len(blocks) * 64
    expected = {"blocks": len(blocks), "padding": places - len(rows.tokens), "filled": len(rows.tokens) / places}
    assert blocks.counts == rows.counts | expected | {"filled": pytest.approx(expected["filled"], abs=1e-4)}
    assert f"in {len(blocks)} blocks, {blocks.counts['filled']:.1%} filled" in data.describe_counts(blocks.counts)
    assert blocks.lengths.max() <= 64 and blocks.sources is None and blocks.fingerprint() != rows.fingerprint()


def test_steps_ranks_and_resuming_are_those_of_any_sequences():
    """N ranks see the blocks of one, a resumed run the rest of them, and padding is not counted."""
    tokenizer = models.load_tokenizer(ModelConfig())
    cfg = BaseConfig(data=settings(), train=TrainConfig(global_batch_size=4, micro_batch_size=2, epochs=3))
    rows = data.tokenize(made_rows(200), cfg.data, tokenizer)

    def steps(rank=0, ranks=1, first=0):
        loaded = data.step_loader(rows, cfg, tokenizer.pad_token_id, rank, ranks, first)
        return [list(step.micro_batches) for step in loaded]

    def seen(*parts):
        return [
            sorted(tuple(d["input_ids"].tolist()) for part in step for m in part for d in _documents(m))
            for step in zip(*parts, strict=True)
        ]

    alone = steps()
    assert seen(alone) == seen(steps(0, 2), steps(1, 2))
    assert seen(alone)[5:] == seen(steps(first=5))
    batches = next(iter(data.step_loader(rows, cfg, 0, 0, 1)))
    assert batches.tokens == sum(len(d["input_ids"]) for m in batches.micro_batches for d in _documents(m))


def _documents(micro_batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The documents of a micro-batch without the padding, which has no target."""
    rows = [{name: values[i] for name, values in micro_batch.items()} for i in range(len(micro_batch["labels"]))]
    return [d for row in rows for d in documents_of(row) if (d["labels"] != IGNORE).any()]


def test_held_out_rows_are_never_packed():
    tokenizer = models.load_tokenizer(ModelConfig())
    packed, held_out = data.tokenized_rows(DataConfig(packing="documents", eval_rows=20), 0, tokenizer)
    assert packed.positions is not None and held_out.positions is None
    assert all(set(b) == {"input_ids", "labels"} for b in evaluation.held_out_batches(held_out, 8, 0))


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_causal_and_ends_with_the_document(dtype):
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]])
    mask = document_mask(positions, dtype)
    seen = torch.tensor([[1, 1, 1, 2, 2, 3], [1, 2, 2, 2, 2, 3]])
    for row, documents in zip(mask, seen, strict=True):
        expected = (documents[:, None] == documents).tril()
        assert torch.equal(row[0] == 0, expected) and (row[0][~expected] == torch.finfo(dtype).min).all()
    assert mask.dtype == dtype and mask.stride(-2) % 8 == 0  # what CUDA's kernels take as it is


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_of_blocks_are_those_of_their_documents(documents, family, checkpointing):
    model = lively(family)
    if checkpointing:
        models.checkpoint_activations(model)
    module = CausalLMLoss(model)

    def loss_and_gradients(rows: list[dict[str, torch.Tensor]], size: int):
        model.zero_grad()
        total = 0.0
        for start in range(0, len(rows), size):
            loss = module(**data.collate(rows[start : start + size], pad_id=0))
            loss.backward()
            total += loss.item()
        return total, [p.grad.clone() for p in model.parameters()]

    packed, gradients = loss_and_gradients([*blocks_of(documents)], size=4)
    alone, expected = loss_and_gradients(documents, size=1)
    assert packed == pytest.approx(alone, rel=1e-6)
    whole = [torch.cat([gradient.flatten() for gradient in part]) for part in (gradients, expected)]
    assert (whole[0] - whole[1]).norm() <= 1e-6 * whole[1].norm()
    for ours, theirs in zip(gradients, expected, strict=True):
        if theirs.norm() > 1e-5 * whole[1].norm():  # a bias of OPT's keys has none but rounding errors
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_logit_changes_if_another_document_of_the_block_does(documents, family):
    model = CausalLMLoss(lively(family)).model.eval()
    generator = torch.Generator().manual_seed(2)
    batch = data.collate([*blocks_of(documents)], pad_id=0)
    inputs = document_inputs(model, batch["position_ids"])
    which = (batch["position_ids"] == 0).cumsum(-1)
    with torch.no_grad():
        before = model(input_ids=batch["input_ids"], **inputs).logits
        for number in range(1, which.max() + 1):
            replaced = which == number
            others = torch.randint(3, 2048, replaced.shape, generator=generator)
            after = model(input_ids=torch.where(replaced, others, batch["input_ids"]), **inputs).logits
            assert (after - before)[~replaced].abs().max() <= 1e-6 * before.abs().max()
            assert (after - before)[replaced].abs().max() > 1e-2


def test_bloom_counts_from_the_documents_start_in_16_bits(documents):
    """Far from a block's start, biases counted from there would be multiples of 4 in bf16."""
    model = CausalLMLoss(lively("bloom").to(torch.bfloat16)).model.eval()
    document = {name: values[:12] for name, values in documents[2].items()}
    before = {"input_ids": torch.arange(900) + 3, "labels": torch.arange(900)}
    (block,) = blocks_of([before, document], size=912)
    with torch.no_grad():
        inputs = document_inputs(model, block["position_ids"][None])
        packed = model(input_ids=block["input_ids"][None], **inputs).logits[0, 900:]
        alone = model(input_ids=document["input_ids"][None]).logits[0]
    assert (packed - alone).norm() < 0.02 * alone.norm()


@pytest.mark.parametrize(
    ("family", "max_length", "fits"),
    [
        ("mistral", 64, True),  # its window is 4,096
        ("mistral", 8192, False),
        ("gpt2", 64, True),
        ("gemma2", 64, True),
        ("mamba", 64, False),  # a state runs through all of the block
        ("gpt_neox", 64, True),
    ],
)
def test_a_family_that_cannot_is_refused_before_the_training(family, max_length, fits):
    config = tiny_config(family)
    if fits:
        check_documents(config, max_length)
    else:
        with refused("data.packing=documents", "data.packing=none"):
            check_documents(config, max_length)


@pytest.mark.parametrize(
    ("family", "kinds", "window"),
    [
        ("lfm2", ["full_attention"] * 3 + ["conv"] * 3, {}),  # a convolution over the tokens before
        ("qwen2", None, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
    ],
)
def test_a_layer_after_the_first_ones_is_tried_too(family, kinds, window):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    options = {
        **small,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        **window,
        **({"layer_types": kinds} if kinds else {}),
    }
    with refused("data.packing=documents", "see each other"):
        check_documents(AutoConfig.for_model(family, **options), 64)


def test_the_check_is_made_where_a_run_reads_its_model(tmp_path):
    tiny_config("mamba").save_pretrained(tmp_path)
    with refused("data.packing=documents", "Mamba"):
        models.load_model_config(ModelConfig(str(tmp_path)), DataConfig(packing="documents"))
    models.load_model_config(ModelConfig(str(tmp_path)), DataConfig(packing="none"))


# --- the projects, by their launchers -------------------------------------------------------------------------------

# Eight steps of 16 blocks, about 60 documents each, with a family of every kind of positions.
PACKED = [*EQUAL, "data.packing=documents", "train.max_steps=8", "data.train_rows=600"]


@pytest.fixture(scope="module")
def unpacked():
    """(loss, gradient norm) by step of a plain loop over the documents of each step, each a row by itself."""

    @functools.cache
    def of(model: str) -> list[tuple[float, float]]:
        options = [*PACKED, f"model.name={model}", "train.micro_batch_size=16"]
        record = plain_loop.train(REPOSITORY / "pytorch-ddp/smoke.yaml", options)
        return [*zip(record["losses"], record["grad_norms"], strict=True)]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("project", "model", "processes", "options"),
    [
        ("pytorch-ddp", "tiny:qwen2", 2, []),
        ("pytorch-ddp", "tiny:bloom", 1, ["train.activation_checkpointing=true"]),
        ("pytorch-ddp", "tiny:llama", 1, ["train.compile=true"]),
        ("pytorch-fsdp", "tiny:opt", 2, []),
        ("pytorch-fsdp", "tiny:qwen2", 1, ["train.activation_checkpointing=true", "train.compile=true"]),
        ("deepspeed-offload", "tiny:llama", 2, []),
        ("deepspeed-pipeline", "tiny:llama", 3, ["train.activation_checkpointing=true"]),
        ("deepspeed-pipeline", "tiny:qwen2", 2, []),
        ("ray-train", "tiny:bloom", 2, []),
        (
            "ray-tune",
            "tiny:qwen2",
            1,
            [
                "search.trials=1",
                "search.scheduler=none",
                "search.space.warmup_steps.choice=[0,5]",
                "train.global_batch_size=16",
            ],
        ),
    ],
)
def test_a_packed_run_has_the_losses_of_a_plain_loop_that_packs_nothing(
    unpacked, tmp_path, project, model, processes, options
):
    variables = {"NUM_WORKERS": str(processes)} if project == "ray-train" else {}
    run(project, *PACKED, f"model.name={model}", *options, f"output_dir={tmp_path}", processes=processes, **variables)
    folder = tmp_path / "trials/trial-000" if project == "ray-tune" else tmp_path
    ours, theirs = losses(folder), unpacked(model)
    relative = 1e-4 if project.startswith("deepspeed") or project == "ray-train" else 1e-5
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], rel=relative)
    # torch's own norm of the reference, which adds up squares in fp32, is 2.5e-5 off for tiny:bloom on a CPU.
    norms = relative if project in ("pytorch-ddp", "ray-tune") else 1e-4  # which have that norm, too
    assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in theirs], rel=norms)


@pytest.mark.slow
def test_a_packed_run_that_was_stopped_resumes_with_its_blocks_and_is_evaluated_unpacked(tmp_path):
    settings = [*PACKED, "checkpoint.every=3"]
    run("pytorch-ddp", *settings, f"output_dir={tmp_path / 'whole'}")
    run("pytorch-ddp", *settings, "runtime.max_hours=0.00001", f"output_dir={tmp_path / 'stopped'}")
    assert 0 < len(losses(tmp_path / "stopped")) < 8
    run("pytorch-ddp", *settings, f"output_dir={tmp_path / 'stopped'}", processes=1)
    assert_close(losses(tmp_path / "stopped"), losses(tmp_path / "whole"), 1e-5)
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "stopped"))
    evaluate = [PYTHON, "pytorch-ddp/eval.py", "--config", "smoke.yaml", *settings, f"output_dir={tmp_path / 'whole'}"]
    done = subprocess.run(
        [*evaluate, "eval.samples=0", "eval.generate_rows=0"],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "whole/eval.json").read_text())
    assert figures["base"]["loss"] == pytest.approx(before["eval_loss_before"], rel=1e-6)
    assert figures["fine_tuned"]["loss"] == pytest.approx(before["eval_loss_after"], rel=1e-6)
    assert before["data"] == after["data"] and before["data"]["training"]["blocks"]
    with_another = run("pytorch-ddp", *settings, "data.packing=none", f"output_dir={tmp_path / 'whole'}", exit_code=2)
    assert "data.packing" in error_line(with_another)
