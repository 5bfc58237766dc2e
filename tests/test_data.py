"""Data: splits, masks by position, packing, and that N ranks see exactly the batches that one would."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from itertools import chain
from operator import itemgetter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import FAMILIES, REPOSITORY, refused

from common import data as data_module
from common import pydoc_data
from common.config import BaseConfig, DataConfig, ModelConfig, TrainConfig
from common.data import (
    StepSampler,
    TokenizedRows,
    collate,
    load_rows,
    prompt_and_reference,
    step_loader,
    tokenize,
    tokenized_rows,
)
from common.loss import IGNORE
from common.models import load_model_config, load_tokenizer
from common.run_folder import RunFolder

EOS = "<|endoftext|>"  # of the tiny tokenizers; their pad token as well, and the BOS of llama and opt


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def write(tmp_path):
    """write("name.jsonl", rows) -> path, by its suffix"""

    def write(name: str, rows: list[dict]) -> str:
        path = tmp_path / name
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        return str(path)

    return write


def tokenizer_of(family: str = "qwen2"):
    return load_tokenizer(ModelConfig(f"tiny:{family}"))


def encode(rows: list[dict], family: str = "qwen2", tokenizer=None, **keys) -> TokenizedRows:
    return tokenize(datasets.Dataset.from_list(rows), DataConfig(**keys), tokenizer or tokenizer_of(family))


def only_row(*arguments, **keys) -> tuple[list[int], list[int]]:
    rows = encode(*arguments, **keys)
    assert len(rows) == 1
    return rows[0]["input_ids"].tolist(), rows[0]["labels"].tolist()


def targets_of(ids: list[int], labels: list[int]) -> list[int]:
    """The target tokens, having checked that a label is its own token or IGNORE."""
    assert len(ids) == len(labels)
    assert all(label in (token, IGNORE) for token, label in zip(ids, labels, strict=True))
    return [label for label in labels if label != IGNORE]


def numbered(n: int) -> list[dict]:
    return [{"text": f"row number {i}"} for i in range(n)]


# --- rows and splits ------------------------------------------------------------------------------------------------


def test_pydoc_rows_are_many_unique_and_fixed():
    rows = pydoc_data.rows()
    assert len(rows) > 3000
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert rows[0]["text"] == f"{rows[0]['prompt']}\n{rows[0]['response']}"
    assert [m["content"] for m in rows[0]["messages"]] == [rows[0]["prompt"], rows[0]["response"]]
    assert all(20 <= len(row["response"]) <= pydoc_data.MOST_CHARACTERS for row in rows)
    assert pydoc_data.rows.__wrapped__() == rows


def test_held_out_rows_never_train_and_do_not_depend_on_train_rows():
    def prompts(seed: int = 1, **keys):
        return [list(split["prompt"]) for split in load_rows(DataConfig(eval_rows=300, **keys), seed)]

    train, held_out = prompts()
    assert len(held_out) == 300
    assert sorted(train + held_out) == sorted(row["prompt"] for row in pydoc_data.rows())
    assert prompts(train_rows=50) == [train[:50], held_out]
    assert prompts() == [train, held_out]
    assert prompts(seed=2)[1] != held_out


def test_rows_sorted_by_label_are_shuffled_before_slicing(write):
    rows = [{"text": f"{i}"} for i in range(1000)]
    train, held_out = load_rows(DataConfig(name=write("sorted.jsonl", rows), train_rows=100, eval_rows=100), seed=3)
    for drawn in (train, held_out):
        assert 25 <= sum(int(text) >= 500 for text in drawn["text"]) <= 75, "one class only, or nearly"


def test_files_of_all_kinds_give_the_same_rows(write):
    rows = [{"prompt": f'say "{i}", é\n', "response": f"line {i}\nand, more"} for i in range(20)]
    read = []
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        data = DataConfig(name=write(name, rows), format="prompt-response", eval_rows=5)
        read.append([split.to_list() for split in load_rows(data, seed=1)])
    assert sorted(row["prompt"] for split in read[0] for row in split) == sorted(row["prompt"] for row in rows)
    assert read[0] == read[1] == read[2]


def test_eval_split_is_another_split(tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    for split, n in (("train", 30), ("test", 8)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(n)))
    train, held_out = load_rows(DataConfig(name=str(folder), eval_split="test", eval_rows=5), seed=1)
    assert sorted(train["text"]) == sorted(f"train {i}" for i in range(30)), "nothing of it is held out"
    assert len(set(held_out["text"])) == 5
    assert all(text.startswith("test ") for text in held_out["text"])
    assert len(load_rows(DataConfig(name=str(folder), eval_split="test", eval_rows=50), seed=1)[1]) == 8
    with refused("data.eval_split=train", "data.split"):
        load_rows(DataConfig(name=str(folder), eval_split="train"), seed=1)


@pytest.mark.parametrize("keys", [{"eval_split": "test"}, {"split": "train[:50%]"}])
def test_a_split_that_a_file_does_not_have_is_refused(write, keys):
    for name in (write("a.jsonl", numbered(5)), "pydoc"):
        with refused(f"data.name={name}", next(iter(keys.values())), "data.split=train", "data.eval_split= (empty)"):
            load_rows(DataConfig(name=name, eval_rows=1, **keys), seed=1)


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_all_targets_and_ends_with_one_eos(family):
    tokenizer = tokenizer_of(family)
    for text in ("Some words.", f"Some words.{EOS}"):
        ids, labels = only_row([{"text": text}], family)
        assert labels == ids
        assert ids == [*tokenizer("Some words.")["input_ids"], tokenizer.eos_token_id]
    assert (ids[0] == tokenizer.bos_token_id) == (family in ("llama", "opt"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["What is it?", f"What {EOS} is {EOS}", "", "a\n\n b "])
@pytest.mark.parametrize("response", ["It is this.", f"It {EOS} is", ""])
def test_the_response_and_its_eos_are_the_targets_whatever_the_prompt_holds(family, prompt, response):
    tokenizer = tokenizer_of(family)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = {"prompt": prompt, "response": response}
    ids, labels = only_row([row], family, format="prompt-response", prompt_template="Q: {prompt}\n")
    answer = tokenizer(response, add_special_tokens=False)["input_ids"]
    assert targets_of(ids, labels) == [*answer, tokenizer.eos_token_id]
    assert labels[-1] == ids[-1] == tokenizer.eos_token_id
    question = tokenizer(f"Q: {prompt}\n")["input_ids"]
    assert ids[: len(question)] == question
    assert labels[: len(question)] == [IGNORE] * len(question)


def test_the_template_takes_any_column():
    row = {"prompt": "Add.", "context": "1 and 2", "response": "3"}
    template = "{context}: {prompt} =>"
    tokenizer = tokenizer_of()
    ids, labels = only_row([row], format="prompt-response", prompt_template=template)
    prompt = [token for token, label in zip(ids, labels, strict=True) if label == IGNORE]
    assert tokenizer.decode(prompt) == "1 and 2: Add. =>"
    data = DataConfig(format="prompt-response", prompt_template=template)
    assert prompt_and_reference(row, data, tokenizer) == (("1 and 2: Add. =>", "3"), "3")


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_conversation_only_the_assistant_s_turns_are_targets(family):
    turns = [("system", "Be brief."), ("user", f"Hi {EOS} assistant"), ("assistant", "Hello!"), ("user", "2+2?"),
             ("assistant", "4"), ("user", "Never answered")]  # fmt: skip
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    tokenizer = tokenizer_of(family)
    ids, labels = only_row([row], family, format="messages")
    targets_of(ids, labels)
    spans, inside = [], False
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORE:
            spans = spans if inside else [*spans, []]
            spans[-1].append(token)
        inside = label != IGNORE
    assert [tokenizer.decode(span) for span in spans] == ["Hello!<|im_end|>\n", f"4<|im_end|>\n{EOS}"]
    assert labels[-1] == tokenizer.eos_token_id
    assert "Never answered" not in tokenizer.decode(ids)
    data = DataConfig(format="messages")
    prompt, reference = prompt_and_reference(row, data, tokenizer)
    assert reference == "4"
    assert prompt.text.endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(ids) == "".join(prompt) + EOS


def test_rows_with_nothing_to_learn_are_dropped():
    for family in FAMILIES:
        rows = encode([{"text": ""}, {"text": "kept"}, {"text": " \n"}], family)
        assert len(rows) == 1, family
    long_prompt = {"prompt": "many words of a prompt " * 10, "response": "never seen"}
    short = {"prompt": "p", "response": "r"}
    rows = encode([long_prompt, short, long_prompt], format="prompt-response", max_length=12)
    assert len(rows) == 1
    assert targets_of(*(rows[0][name].tolist() for name in ("input_ids", "labels")))


def test_every_row_that_is_dropped_or_cut_is_counted_by_its_reason(tmp_path, capsys):
    words = "many words of a prompt " * 10
    pairs = [("p", "r")] * 3 + [(words, "never seen")] * 4 + [("p", "an answer " * 20)] * 2
    rows = encode([{"prompt": p, "response": r} for p, r in pairs], format="prompt-response", max_length=12)
    too_long = "longer than data.max_length=12"
    dropped, cut = {f"its prompt is {too_long}": 4}, {too_long: 2}
    assert rows.counts == {"rows": 9, "kept": len(rows), "dropped": dropped, "cut": cut} and len(rows) == 5
    texts = [{"text": text} for text in ("a", " \n", "", "b c d")]
    assert encode(texts).counts == {"rows": 4, "kept": 2, "dropped": {"no text": 2}, "cut": {}}
    packed = encode([*texts, {"text": "word " * 50}], packing="wrapped", max_length=16)
    n = len(encode([*texts, {"text": "word " * 50}]).tokens)
    assert packed.counts == {
        "rows": 5, "kept": 3, "dropped": {"no text": 2}, "cut": {}, "blocks": n // 16, "blocks_dropped": {},
        "tokens_dropped": {"they fill no block": n % 16},
    }  # fmt: skip

    # What the main process prints, and what stands in summary.json.
    write_rows = "".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs * 20)
    (tmp_path / "rows.jsonl").write_text(write_rows)
    data = DataConfig(name=str(tmp_path / "rows.jsonl"), format="prompt-response", max_length=12, eval_rows=30)
    training, held_out = tokenized_rows(data, 1, tokenizer_of())
    both = training.counts
    assert [both[part]["rows"] for part in ("training", "held_out")] == [150, 30]
    assert sum(both[part]["dropped"][f"its prompt is {too_long}"] for part in both) == 80
    assert sum(both[part]["cut"][too_long] for part in both) == 40
    assert (both["training"]["kept"], both["held_out"]["kept"]) == (len(training), len(held_out))
    for is_main in (True, False):
        run = RunFolder(BaseConfig(output_dir=str(tmp_path / "run")), "pytorch-ddp", is_main, {})
        run.log_rows(both)
        assert run.summarize("failed")["data"] == both
        printed = capsys.readouterr().out
        assert printed.count("\n") == is_main
        if is_main:
            assert printed.startswith(f"Data: training: {len(training)} of 150 rows, ")
            for part, name in (("training", "training"), ("held_out", "held-out")):
                assert f"{name}: {both[part]['kept']} of" in printed
                assert (
                    f"{both[part]['dropped'][f'its prompt is {too_long}']} dropped: its prompt is {too_long}" in printed
                )
                assert f"{both[part]['cut'][too_long]} cut: {too_long}" in printed


# --- packing --------------------------------------------------------------------------------------------------------


def test_long_rows_are_truncated_when_not_packed():
    text = "one two three four five six seven eight nine ten " * 5
    whole, _ = only_row([{"text": text}])
    ids, labels = only_row([{"text": text}], max_length=16)
    assert (ids, labels) == (whole[:16], whole[:16])


@pytest.mark.parametrize("family", ["qwen2", "opt"])
@pytest.mark.parametrize("data_format", ["text", "prompt-response", "messages"])
def test_wrapped_blocks_are_full_and_hold_every_token_once_in_order(monkeypatch, family, data_format):
    monkeypatch.setattr(data_module, "ROWS_AT_ONCE", 7)  # several calls of the tokenizer
    rows = pydoc_data.rows()[:50]
    documents = encode(rows, family, format=data_format, max_length=10_000)
    blocks = encode(rows, family, format=data_format, max_length=64, packing="wrapped")
    assert len(documents) == 50
    assert set(blocks.lengths) == {64}
    n = len(blocks) * 64
    assert 0 <= len(documents.tokens) - n < 64, "only a tail shorter than a block may be left out"
    assert np.array_equal(blocks.tokens, documents.tokens[:n])
    assert np.array_equal(blocks.labels, documents.labels[:n])
    eos = tokenizer_of(family).eos_token_id
    assert all(documents[i]["labels"][-1] == eos for i in range(50)), "documents are joined by EOS"


def test_held_out_rows_are_not_packed_when_the_caller_says_so():
    rows = datasets.Dataset.from_list(numbered(5))
    assert len(tokenize(rows, DataConfig(packing="wrapped", max_length=8), tokenizer_of(), packing="none")) == 5


def test_the_fingerprint_is_that_of_the_data():
    fingerprint = encode(numbered(9)).fingerprint()
    assert encode(numbered(9)).fingerprint() == fingerprint
    assert encode(numbered(8)).fingerprint() != fingerprint
    assert encode(numbered(9)[::-1]).fingerprint() != fingerprint
    assert encode(numbered(9), max_length=3).fingerprint() != fingerprint
    rows = encode([{"prompt": "ab", "response": "cd"}], format="prompt-response")
    whole = TokenizedRows(rows.tokens, rows.tokens, rows.offsets)
    assert whole.fingerprint() != rows.fingerprint(), "the mask counts"
    split = TokenizedRows(rows.tokens, rows.labels, np.array([0, 1, len(rows.tokens)]))
    assert split.fingerprint() != rows.fingerprint(), "where a row begins counts"


# --- batches --------------------------------------------------------------------------------------------------------


def test_collate_pads_on_the_right():
    rows = [{"input_ids": torch.tensor(r), "labels": torch.tensor([IGNORE, *r[1:]])} for r in ([5, 6, 7], [8, 9])]
    batch = collate(rows, pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [IGNORE, 9, IGNORE]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def made_up_rows(n: int) -> TokenizedRows:
    """Row i holds only the token i + 10, one to nine times."""
    lengths = np.random.default_rng(0).integers(1, 10, n) + 1
    tokens = np.repeat(np.arange(n) + 10, lengths).astype(np.int32)
    return TokenizedRows(tokens, tokens, np.concatenate([[0], np.cumsum(lengths)]))


def config(micro_batch: int = 1, seed: int = 42, **train) -> BaseConfig:
    return BaseConfig(train=TrainConfig(global_batch_size=8, micro_batch_size=micro_batch, **train), seed=seed)


def steps(cfg: BaseConfig, rank: int = 0, world_size: int = 1, first_step: int = 0, n: int = 53) -> list[list[int]]:
    return list(StepSampler(made_up_rows(n), cfg, rank, world_size, first_step))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_n_ranks_see_the_batches_of_one(world_size):
    cfg = config(epochs=2.5)
    alone, lengths = steps(cfg), made_up_rows(53).lengths
    shares = [steps(cfg, rank, world_size) for rank in range(world_size)]
    assert len(alone) == 15  # 6 global batches of 8 fit into 53 rows
    for step, batch in enumerate(alone):
        parts = [share[step] for share in shares]
        assert {len(part) for part in parts} == {8 // world_size}
        assert sorted(chain(*parts)) == sorted(batch)
        work = [sum(lengths[part]) for part in parts]
        assert max(work) - min(work) <= max(lengths), "no rank gets all the long rows"


def test_an_epoch_sees_a_row_at_most_once_and_the_next_is_in_another_order():
    all_steps = steps(config(epochs=3))
    epochs = [list(chain(*all_steps[i : i + 6])) for i in (0, 6, 12)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 48
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len(set().union(*epochs)) > 48, "the rows left out are others each time"
    assert steps(config(epochs=3)) == all_steps
    assert steps(config(epochs=3, seed=43)) != all_steps


@pytest.mark.parametrize("first_step", [0, 1, 5, 6, 7, 12, 14, 15])
def test_from_a_later_step_on_comes_exactly_the_tail(first_step):
    cfg = config(epochs=2.5)
    assert steps(cfg, 1, 2, first_step) == steps(cfg, 1, 2)[first_step:]
    assert len(StepSampler(made_up_rows(53), cfg, 1, 2, first_step)) == 15 - first_step


def test_max_steps_wins_over_epochs_and_a_bit_of_an_epoch_is_a_step():
    assert len(steps(config(max_steps=20, epochs=1))) == 20
    assert len(steps(config(epochs=0.01))) == 1
    assert len(steps(config(epochs=1.1))) == 7
    assert StepSampler(made_up_rows(400), config(epochs=1.1), 0, 1).total_steps == 55  # 1.1 * 50 is more in binary


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_step_s_rows_do_not_depend_on_ranks_or_micro_batch(world_size, micro_batch):
    rows = made_up_rows(53)

    def seen(cfg, ranks):
        loaders = [step_loader(rows, cfg, pad_id=0, rank=rank, world_size=ranks) for rank in range(ranks)]
        for parts in zip(*loaders, strict=True):
            micro_batches = [batch for part in parts for batch in part.micro_batches]
            assert all(len(batch["input_ids"]) == cfg.train.micro_batch_size for batch in micro_batches)
            sequences = sorted(
                [token for token in row.tolist() if token] for batch in micro_batches for row in batch["input_ids"]
            )
            yield sequences, sum(part.targets for part in parts), sum(part.tokens for part in parts)

    alone = list(seen(config(micro_batch=8, epochs=2), 1))
    assert list(seen(config(micro_batch=micro_batch, epochs=2), world_size)) == alone
    for sequences, targets, tokens in alone:
        assert tokens == sum(len(sequence) for sequence in sequences), "padding is not counted"
        assert targets == tokens - 8, "the first token of a sequence has no loss"


def test_the_loader_draws_no_random_numbers_of_the_run():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len(list(step_loader(made_up_rows(53), config(epochs=2), 0, 0, 1))) == 12
    assert torch.equal(torch.get_rng_state(), before)


# --- what a user may get wrong --------------------------------------------------------------------------------------


def test_a_file_that_is_missing_empty_or_broken_is_refused(tmp_path):
    for name in ("nowhere.jsonl", "./nowhere", "/nowhere/x", "nowhere.csv.gz"):
        with refused(f"data.name={name}: no such file"):
            load_rows(DataConfig(name=name), seed=1)
    for name, content, reason in [
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.jsonl", b"\n\n", "has no rows"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": "b', "cannot be read as json: row 2: Unterminated string"),
        ("broken-first.jsonl", b'{"text": "a\n{"text": "b"}\n', "row 1"),
        ("list.jsonl", b'["a", "b"]', "row 1 is not an object"),
        ("number.jsonl", b'{"text": "a"}\n{"text": 4}\n', "row 2: column text holds a number"),
        ("null.jsonl", b'{"text": "a"}\n{"text": null}\n', "row 2: column text has no value"),
        ("missing.jsonl", b'{"text": "a"}\n{"other": "b"}\n', "row 2: column text has no value"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}\n', "surrogates not allowed"),
        ("broken.json", b'[{"text": "a"},\n {"text": "b"', "line 2"),
        ("broken.parquet", b"no parquet", "cannot be read as parquet"),
        ("broken.csv", b'text,label\n"a,1\nb,2\n', "cannot be read as csv"),
        ("short.csv", b"text,label\na,1\nb\n", "line 3 has 1 cells, and the first line 2"),
        ("twice.csv", b"text,text\na,b\n", "the column 'text' twice"),
        ("binary.csv", b"\xff\xfe\x00", "not in UTF-8 (byte 0xff"),
        ("latin.csv", "text\ncafé\n".encode("latin-1"), "not in UTF-8 (byte 0xe9"),
        ("latin.jsonl", '{"text": "café"}\n'.encode("latin-1"), "not in UTF-8 (byte 0xe9"),
        ("header.csv", b"text,label\n", "has no rows"),
        ("broken.jsonl.gz", b"no gzip", "cannot be read as jsonl"),
        ("rows.txt", b"a\nb\n", ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, also with .gz"),
    ]:
        (tmp_path / name).write_bytes(content)
        with refused(f"data.name={tmp_path / name}", reason):
            load_rows(DataConfig(name=str(tmp_path / name)), seed=1)


TRICKY = ["01234", "NA", "None", "null", "nan", "4", "1.50", "1e3", "true", "2024-01-02", "2024-01-02T03:04:05Z", "é",
          "0.1000000000000000055511151231257827", "99999999999999999999999", "-0", "", " x ", "a,b\t\"c\"", "l1\nl2",
          "\u2028", "[1, 2]", "{'a': 1}", "=1+1", "\r\n"]  # fmt: skip


def written(path: Path, rows: list[dict]) -> Path:
    """Written without the product's help, by its suffix."""
    kind, compression = path.name.lower().partition(".")[2].partition(".")[::2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if kind in ("csv", "tsv"):
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(rows[0]), delimiter={"csv": ",", "tsv": "\t"}[kind])
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    elif kind == "json":
        text = json.dumps(rows, indent=1)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "": open}[compression](path, "wb") as file:
        file.write(text.encode())
    return path


SUFFIXES = [
    "jsonl",
    "ndjson",
    "json",
    "csv",
    "tsv",
    "parquet",
    "JSONL",
    "Csv",
    "jsonl.gz",
    "csv.GZ",
    "tsv.bz2",
    "json.xz",
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cell_is_text_as_it_is_written_in_a_file_of_any_kind(tmp_path, monkeypatch, suffix):
    """In the prompt, in the response and in the template's columns; by whatever name, from whatever folder."""
    rows = [{"prompt": f"q{i}", "response": text, "extra": text} for i, text in enumerate(TRICKY)] * 2
    path = written(tmp_path / f"rows.{suffix}", rows)
    keys = {"format": "prompt-response", "prompt_template": "{extra}|{prompt}", "eval_rows": 1}
    monkeypatch.chdir(tmp_path)
    for name in (str(path), path.name, f"./{path.name}", f"../{tmp_path.name}/{path.name}"):
        data = DataConfig(name=name, **keys)
        read = [row for split in load_rows(data, seed=1) for row in split.to_list()]
        key = itemgetter("prompt", "response")
        assert sorted(read, key=key) == sorted(rows, key=key)
        prompts = data_module.render_prompts({name: [row[name] for row in read] for name in read[0]}, data)
        assert prompts == [f"{row['extra']}|{row['prompt']}" for row in read]


def test_numbers_of_json_reach_a_prompt_as_they_are_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    values = ["4", "1.50", "1e3", "-0", "12345678901234567890.123", "true", "false"]
    lines = [
        f'{{"prompt": "p", "response": "r", "n": {n}, "list": ["x", {n}], "deep": {{"a": {n}}}}}\n' for n in values
    ]
    path.write_text("".join(lines))
    template = "{n} {list[1]} {deep[a]}"
    data = DataConfig(name=str(path), format="prompt-response", prompt_template=template, eval_rows=1)
    read = [row for split in load_rows(data, seed=1) for row in split.to_list()] if "true" not in values else None
    if read is None:  # Arrow has no column of numbers and truths inside a list
        path.write_text("".join(lines[:5]))
        read = [row for split in load_rows(data, seed=1) for row in split.to_list()]
    prompts = data_module.render_prompts({name: [row[name] for row in read] for name in read[0]}, data)
    assert sorted(prompts) == sorted(f"{n} {n} {n}" for n in values[:5])


def test_no_value_of_a_template_is_printed_as_python_would():
    for value, shown in ((True, "true"), (0.5, "0.5"), (7, "7"), ("x", "x")):
        batch = {"prompt": ["p"], "v": [value]}
        assert data_module.render_prompts(batch, DataConfig(prompt_template="{v}{prompt}")) == [f"{shown}p"]
    for value, kind in ((None, "without a value"), ([1], "a list"), ({"a": 1}, "an object"), (b"x", "bytes")):
        with refused("data.prompt_template", "{v}{prompt}", kind.removeprefix("an "), "row 5"):
            data_module.render_prompts({"prompt": ["p"], "v": [value]}, DataConfig(prompt_template="{v}{prompt}"), 5)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_column_of_the_template_that_has_no_value_names_row_and_column(tmp_path, suffix):
    rows = [{"context": context, "prompt": f"p{i}", "response": "r"} for i, context in enumerate(["c", "", None, ""])]
    path = written(tmp_path / f"rows.{suffix}", rows)
    data = DataConfig(name=str(path), format="prompt-response", prompt_template="{context}\n{prompt}\n", eval_rows=1)
    if suffix == "csv":  # there an empty cell is an empty text
        assert sorted(row["context"] for split in load_rows(data, seed=1) for row in split.to_list()) == [
            "",
            "",
            "",
            "c",
        ]
    else:
        with refused(str(path), "row 3", "column context has no value", "{context}", "data.prompt_template"):
            load_rows(data, seed=1)
    data.prompt_template = "{contxt}{prompt}"
    with refused("{contxt}", "the columns context, prompt, response"):
        load_rows(data, seed=1)


def test_a_path_is_no_pattern(tmp_path):
    names = [
        "q[1].jsonl",
        "q1.jsonl",
        "z[ab].jsonl",
        "za.jsonl",
        "a*.jsonl",
        "ab.jsonl",
        "w?.jsonl",
        "wx.jsonl",
        "{a,b}.jsonl",
    ]
    for name in names:
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n" + json.dumps({"text": name}) + "\n")
    for name in names:
        train, held_out = load_rows(DataConfig(name=str(tmp_path / name), eval_rows=1), seed=1)
        assert (*train["text"], *held_out["text"]) == (name, name)
    for folder in ("d[1]", "d1", "d*"):  # as a folder, and as the folder of a file
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text(
            json.dumps({"text": folder}) + "\n" + json.dumps({"text": folder})
        )
    for folder in ("d[1]", "d1", "d*"):
        for name in (folder, f"{folder}/train.jsonl"):
            train, held_out = load_rows(DataConfig(name=str(tmp_path / name), eval_rows=1), seed=1)
            assert (*train["text"], *held_out["text"]) == (folder, folder)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_file_is_read_as_it_is_now(tmp_path, suffix, as_folder):
    """Even if size and time of change are those of what a library has in its cache."""
    folder = tmp_path / "rows"
    folder.mkdir()
    path = folder / f"train.{suffix}"
    for text in ("one", "two"):
        written(path, [{"text": text}] * 2)
        os.utime(path, ns=(10**18, 10**18))
        train, _ = load_rows(DataConfig(name=str(folder if as_folder else path), eval_rows=1), seed=1)
        assert list(train["text"]) == [text]


def test_a_folder_s_files_are_its_splits_as_written(tmp_path):
    rows = {
        split: [{"text": f"0{i}", "n": str(i)} for i in range(start, start + 10)]
        for split, start in (("train", 0), ("test", 20))
    }
    for split, part in rows.items():
        written(tmp_path / f"{split}.csv", part)

    def read(split: str) -> list[str]:
        data = DataConfig(name=str(tmp_path), split=split, eval_rows=1)
        return sorted(text for part in load_rows(data, seed=1) for text in part["text"])

    assert read("train") == [f"0{i}" for i in range(10)]
    assert read("train[:50%]") == [f"0{i}" for i in range(5)]
    assert read("train[8:]+test[:2]") == ["020", "021", "08", "09"]
    with refused("no split dev", "train, test"):
        read("dev")
    with refused("split train[:"):
        read("train[:5x]")


@pytest.mark.slow
def test_text_is_utf8_and_rows_are_the_same_in_any_locale_and_hash_seed(tmp_path):
    path = written(tmp_path / "rows.csv", [{"text": f"é{i} 中"} for i in range(9)])
    script = (
        "import gc, sys; gc.disable(); "
        "from common.config import DataConfig, ModelConfig; from common.data import load_rows, tokenize; "
        "from common.models import load_tokenizer; data = DataConfig(name=sys.argv[1], eval_rows=2); "
        "print(tokenize(load_rows(data, 1)[0], data, load_tokenizer(ModelConfig('tiny:qwen2'))).fingerprint())"
    )
    data = DataConfig(name=str(path), eval_rows=2)
    expected = tokenize(load_rows(data, 1)[0], data, tokenizer_of()).fingerprint()
    variables = {
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Tokyo",
    }
    environment = os.environ | variables | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", script, path.name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == expected


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"format": "text", "text_column": "body"}, "data.text_column=body"),
        ({"format": "prompt-response", "prompt_column": "ask"}, "data.prompt_column=ask"),
        ({"format": "prompt-response", "prompt_column": "a", "response_column": "ask"}, "data.response_column=ask"),
        ({"format": "messages"}, "data.messages_column=messages"),
    ],
)
def test_a_missing_column_is_refused_with_those_that_there_are(write, keys, key):
    path = write("a.jsonl", [{"a": "x", "b": "y"}] * 3)
    with refused(key, path, "the columns a, b"):
        load_rows(DataConfig(name=path, **keys), seed=1)


def test_too_few_rows_are_refused(write):
    path = write("a.jsonl", numbered(5))
    with refused(path, "5 rows", "data.eval_rows=5"):
        load_rows(DataConfig(name=path, eval_rows=5), seed=1)
    with refused("train.global_batch_size=8", "7 training sequences"):
        StepSampler(made_up_rows(7), config(), 0, 1)
    assert len(load_rows(DataConfig(name=path, eval_rows=4), seed=1)[0]) == 1


@pytest.mark.parametrize("value", [None, 3, 1.5, ["a"]])
def test_a_row_that_is_no_text_is_refused(value):
    kind = type(value).__name__
    with refused("row 0", "column text", kind):
        encode([{"text": value}])
    for column in ("prompt", "response"):
        with refused("row 0", f"column {column}", kind):
            encode([{"prompt": "p", "response": "r", column: value}], format="prompt-response")


def test_the_number_of_a_bad_row_counts_over_all_calls_of_the_tokenizer(monkeypatch):
    monkeypatch.setattr(data_module, "ROWS_AT_ONCE", 2)
    with refused("row 5"):
        encode([*numbered(5), {"text": None}])


@pytest.mark.parametrize("template", ["{prompt} {nope}", "{prompt", "{0}", "{prompt.x}", "{prompt[x]}", "{prompt:d}"])
def test_a_template_that_cannot_be_filled_in_is_refused(template):
    with refused("data.prompt_template", repr(template), "columns are prompt, response, n"):
        encode([{"prompt": "p", "response": "r", "n": 1}], format="prompt-response", prompt_template=template)


@pytest.mark.parametrize(
    "messages",
    [
        "no list",
        [],
        [{"role": "user", "content": "nobody answers"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "text": "no content"}],
        ["assistant"],
        None,
    ],
)
def test_malformed_messages_are_refused(messages):
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = {"messages": [good, messages]}
    with refused("row 1", "column messages", "role, content"):
        # As a reader would hand it over; a Dataset would not take the two rows side by side.
        list(data_module._encode_messages(rows, 0, DataConfig(format="messages"), tokenizer_of()))


def test_messages_need_a_chat_template(monkeypatch):
    tokenizer = tokenizer_of()
    monkeypatch.setattr(tokenizer, "chat_template", None)
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    with refused("data.format=messages", "chat template", "prompt-response"):
        encode([row], tokenizer=tokenizer, format="messages")


def test_when_nothing_is_left_max_length_is_named():
    prompts = [{"prompt": "a long prompt " * 9, "response": "r"}]
    with refused("data.max_length=4", "prompts are too long"):
        encode(prompts, format="prompt-response", max_length=4)
    with refused("data.max_length=500", "fill one block"):
        encode(numbered(3), packing="wrapped", max_length=500)
    with refused("texts are empty"):
        encode([{"text": ""}] * 3, "llama")


def test_max_length_above_the_model_s_is_refused():
    with refused("data.max_length=1025", "tiny:qwen2", "1024 or less"):
        load_model_config(ModelConfig("tiny:qwen2"), DataConfig(max_length=1025))
    assert load_model_config(ModelConfig("tiny:qwen2"), DataConfig(max_length=1024)).model_type == "qwen2"
    load_model_config(ModelConfig("tiny:bloom"), DataConfig(max_length=5000))  # ALiBi knows no longest sequence


def test_an_unknown_tiny_model_is_refused_with_those_that_there_are():
    for load in (load_tokenizer, load_model_config):
        with refused("model.name=tiny:gpt5", *(f"tiny:{family}" for family in FAMILIES)):
            load(ModelConfig("tiny:gpt5"))


def test_a_sequence_knows_the_row_that_it_came_from():
    rows = datasets.Dataset.from_list([{"text": text} for text in ("one", " \n", "three", "", "five")])
    tokenizer = load_tokenizer(ModelConfig("tiny:qwen2"))
    assert tokenize(rows, DataConfig(), tokenizer).sources.tolist() == [0, 2, 4]
    assert tokenize(rows, DataConfig(max_length=2), tokenizer, packing="wrapped").sources is None
