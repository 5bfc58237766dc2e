"""Tokenized rows on disk: equal to those made in memory, made once, and never in the way."""

import contextlib
import copy
import dataclasses
import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from conftest import refused
from huggingface_hub import constants

from common import data as data_module
from common import token_cache
from common.config import BaseConfig, DataConfig, ModelConfig
from common.data import TokenizedRows, held_out_rows, load_rows, step_loader, tokenize, tokenized_rows
from common.errors import UserError
from common.launched import free_port
from common.models import load_tokenizer

TEXTS = [f"row {i}: " + "some words to learn " * (i % 7) for i in range(60)]
ROWS = [
    {"text": text, "prompt": text[:9], "response": text[9:] or "nothing",
     "messages": [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:] or "nothing"}]}
    for text in TEXTS
]  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """The folder of the cache, which is not there yet."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(token_cache.VARIABLE, raising=False)
    return tmp_path / "home/multi-gpu-fine-tuning"


@pytest.fixture
def rows_file(tmp_path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def made(monkeypatch) -> list:
    """Grows when rows are tokenized."""
    calls: list = []
    monkeypatch.setattr(data_module, "load_rows", lambda *args: calls.append(args) or load_rows(*args))
    return calls


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer_of(family: str = "qwen2"):
    return copy.deepcopy(load_tokenizer(ModelConfig(f"tiny:{family}")))


def settings(name: Path | str, **keys) -> DataConfig:
    return DataConfig(**{"name": str(name), "eval_rows": 10, "max_length": 24, "packing": "none"} | keys)


def entries(home: Path) -> list[Path]:
    return sorted(home.glob("rows-*/"))


def assert_equal(ours: TokenizedRows, theirs: TokenizedRows) -> None:
    for field in dataclasses.fields(TokenizedRows):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype and np.array_equal(a, b), field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize("packing", ["none", "wrapped", "documents"])
@pytest.mark.parametrize("data_format", ["text", "prompt-response", "messages"])
def test_rows_from_the_cache_are_those_made_in_memory(rows_file, made, home, data_format, packing):
    data = settings(rows_file, format=data_format, packing=packing)
    training, held_out = load_rows(data, 1)
    for _ in range(2):
        rows, held_out_rows = tokenized_rows(data, 1, tokenizer_of())
        expected = tokenize(training, data, tokenizer_of())
        expected_held_out = tokenize(held_out, data, tokenizer_of(), packing="none")
        assert rows.counts == {"training": expected.counts, "held_out": expected_held_out.counts}
        assert_equal(dataclasses.replace(rows, counts=expected.counts), expected)
        assert_equal(held_out_rows, expected_held_out)
        assert rows.fingerprint() == expected.fingerprint()
    assert len(made) == len(entries(home)) == 1


def test_the_arrays_are_mapped_read_only_and_train_without_a_warning(rows_file, recwarn):
    rows, _ = tokenized_rows(settings(rows_file), 1, tokenizer_of())
    assert isinstance(rows.tokens.base, np.memmap)
    assert type(rows.tokens) is np.ndarray, "a subclass would be copied into what Ray sends to each trial"
    with pytest.raises(ValueError, match="read-only"):
        rows.tokens[0] = 1
    cfg = BaseConfig()
    cfg.train.global_batch_size = 8
    batch = next(iter(step_loader(rows, cfg, 0, 0, 1))).micro_batches[0]
    batch["input_ids"] += 1  # a copy of its own
    assert batch["input_ids"].dtype == torch.int64
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_whatever_tokens_depend_on_gives_another_entry(rows_file, tmp_path, made, home, monkeypatch):
    def count_of(data: DataConfig, seed: int = 1, tokenizer=None) -> int:
        tokenized_rows(data, seed, tokenizer or tokenizer_of())
        return len(made)

    base = settings(rows_file, format="messages")
    assert count_of(base) == 1
    assert count_of(settings(write(tmp_path / "moved.jsonl", ROWS), format="messages")) == 1, "a name is not content"
    assert count_of(settings(write(tmp_path / "rows.jsonl", [*ROWS[:-1], ROWS[0]]), format="messages")) == 2
    write(tmp_path / "rows.jsonl", ROWS)
    assert count_of(base) == 2, "the rows are those of the first entry again"
    changes = {"max_length": 25, "eval_rows": 11, "train_rows": 20, "packing": "wrapped", "date": "01 Jan 2025",
               "format": "text", "prompt_template": "{prompt}:"}  # fmt: skip
    for number, (key, value) in enumerate(changes.items(), 3):
        assert count_of(dataclasses.replace(base, **{key: value})) == number, key
    count = 2 + len(changes)
    assert count_of(base, seed=2) == count + 1
    assert count_of(base, tokenizer=tokenizer_of("llama")) == count + 2
    used = tokenizer_of()
    used(["a", "longer"], padding=True, truncation=True, max_length=2)  # which it remembers
    assert count_of(base, tokenizer=used) == count + 2
    with_template = tokenizer_of()
    with_template.chat_template = with_template.chat_template + " "
    assert count_of(base, tokenizer=with_template) == count + 3
    with_eos = tokenizer_of()
    with_eos.eos_token = "a"
    assert count_of(base, tokenizer=with_eos) == count + 4
    monkeypatch.setattr(token_cache, "_program", lambda: ["another version"])
    assert count_of(base) == count + 5
    assert len(entries(home)) == count + 5


def test_rows_that_datasets_reads_are_known_by_their_values(tmp_path):
    table = pa.table({"text": TEXTS, "n": range(60)})
    digest = token_cache.digest_of_table(table)
    assert token_cache.digest_of_table(pa.table({"text": TEXTS, "n": range(60)})) == digest
    assert token_cache.digest_of_table(table[1:]) != digest
    assert token_cache.digest_of_table(table.set_column(0, "text", [[*TEXTS[:-1], "other"]])) != digest
    assert token_cache.digest_of_table(table.rename_columns(["prompt", "n"])) != digest
    nested = datasets.Dataset.from_list(ROWS).data.table
    assert token_cache.digest_of_table(nested) == token_cache.digest_of_table(
        datasets.Dataset.from_list(ROWS).data.table
    )


def test_which_split_a_file_belongs_to_is_part_of_the_key(tmp_path, made):
    for names in (("train-0", "train-1", "test-0"), ("train-0", "test-0", "test-1")):  # the same files, in one order
        folder = tmp_path / names[1]
        folder.mkdir()
        for name, start in zip(names, (0, 20, 40), strict=True):
            write(folder / f"{name}.jsonl", ROWS[start : start + 20])
        rows, _ = tokenized_rows(settings(folder, split="train[:15]+test"), 1, tokenizer_of())
        assert len(rows) == 15 + 20 * sum(name.startswith("test") for name in names) - 10
    assert len(made) == 2


@pytest.mark.parametrize("kind", ["file", "pydoc"])
def test_an_evaluation_finds_the_held_out_rows(rows_file, made, home, kind):
    data = settings(rows_file if kind == "file" else "pydoc", format="messages")
    _, expected = load_rows(data, 1)
    for _ in range(2):
        rows = held_out_rows(data, 1, is_main=True)
        assert rows.to_list() == expected.to_list() and len(rows) == 10
        assert rows.features == expected.features
    assert len(made) == len(entries(home)) == 1
    assert held_out_rows(data, 2, is_main=True).to_list() != expected.to_list()


@pytest.mark.parametrize("damage", ["truncated", "changed", "foreign", "missing", "index", "not ours"])
def test_an_entry_that_is_not_what_was_written_is_made_again(rows_file, made, home, damage):
    rows, _ = tokenized_rows(settings(rows_file), 1, tokenizer_of())
    fingerprint = rows.fingerprint()
    del rows
    (entry,) = entries(home)
    file, index = entry / "training-tokens.npy", entry / "rows.json"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 4)
    elif damage == "changed":  # a single bit; the size stays
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "foreign":
        np.save(file, np.arange(9))
    elif damage == "missing":
        file.unlink()
    elif damage == "index":
        index.write_text("{")
    else:
        index.write_text('{"training": []}')
    assert tokenized_rows(settings(rows_file), 1, tokenizer_of())[0].fingerprint() == fingerprint
    assert len(made) == 2
    assert tokenized_rows(settings(rows_file), 1, tokenizer_of())[0].fingerprint() == fingerprint
    assert len(made) == 2, "it is whole again"


def test_only_the_owner_can_read_an_entry(rows_file, home):
    earlier = os.umask(0)
    try:
        tokenized_rows(settings(rows_file), 1, tokenizer_of())
    finally:
        os.umask(earlier)
    (entry,) = entries(home)
    assert entry.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in entry.iterdir()} == {0o600}
    assert not list(home.glob(".writing-*"))


FORK = multiprocessing.get_context("fork")  # a fresh Python would import torch for seconds


def tokenize_slowly(pipe, file: Path, seconds: float) -> None:
    """Sends "making" if it tokenizes the rows, which then takes so long, and at its end their fingerprint."""

    def slow(*arguments):
        pipe.send("making")
        time.sleep(seconds)
        return load_rows(*arguments)

    data_module.load_rows = slow
    pipe.send(tokenized_rows(settings(file), 1, tokenizer_of())[0].fingerprint())


def started(target, *arguments) -> tuple[multiprocessing.Process, Connection]:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def all_of(pipe: Connection) -> list:
    """What a process sends until its end."""
    received = []
    with contextlib.suppress(EOFError):
        while pipe.poll(120):
            received.append(pipe.recv())
    return received


@pytest.mark.slow
def test_of_processes_at_once_one_makes_it_and_if_that_is_killed_another(rows_file, home):
    first, pipe = started(tokenize_slowly, rows_file, 600)
    assert pipe.recv() == "making"  # it holds the lock now
    others = [started(tokenize_slowly, rows_file, 0.1)[1] for _ in range(2)]
    time.sleep(2)
    assert not any(other.poll() for other in others), "they wait"
    first.kill()
    expected = tokenized_rows(settings(rows_file), 1, tokenizer_of())[0].fingerprint()
    received = [all_of(other) for other in others]
    assert {messages[-1] for messages in received} == {expected}
    assert sum(map(len, received)) <= 3, "one of them took over, or this process did"
    assert len(entries(home)) == 1


def test_a_cache_that_cannot_be_written_costs_one_warning(rows_file, home, made, capsys):
    expected = tokenize(load_rows(settings(rows_file), 1)[0], settings(rows_file), tokenizer_of()).fingerprint()
    home.parent.write_text("a file where the folder should be")  # root can write to read-only folders
    for is_main in (True, False):
        rows, _ = tokenized_rows(settings(rows_file), 1, tokenizer_of(), show_progress=is_main)
        assert rows.fingerprint() == expected
        warning = capsys.readouterr().err
        assert warning.count("warning: ") == is_main
        assert not is_main or ("HF_HOME" in warning and str(home) in warning)
    assert len(made) == 2


def test_a_full_disk_costs_one_warning_and_leaves_nothing(rows_file, home, capsys):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))  # to write more is an error of the disk
    try:
        rows, _ = tokenized_rows(settings(rows_file), 1, tokenizer_of(), show_progress=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(rows) == 50 and capsys.readouterr().err.count("warning: ") == 1
    assert not entries(home) and not list(home.glob(".writing-*"))


def test_an_error_in_the_rows_is_reported_and_nothing_is_kept(rows_file, home):
    for _ in range(2):  # the lock is free again
        with refused("data.text_column=absent", "text, prompt, response"):
            tokenized_rows(settings(rows_file, text_column="absent"), 1, tokenizer_of())
    assert not entries(home)


def test_the_cache_is_bounded_and_spares_what_is_in_use(rows_file, home, monkeypatch):
    monkeypatch.setenv(token_cache.VARIABLE, "1e-6")  # less than any entry
    all_of(started(tokenize_slowly, rows_file, 0)[1])  # which has it mapped no longer
    (first,) = entries(home)  # the only one is kept
    with contextlib.ExitStack() as until_read:
        holder, pipe = started(hold, first / "rows.json")
        until_read.callback(holder.join, 30)
        until_read.callback(holder.kill)
        assert pipe.recv() == "held"
        for length in (20, 21):
            tokenized_rows(settings(rows_file, max_length=length), 1, tokenizer_of())
        assert first in entries(home), "another process has it mapped"
    tokenized_rows(settings(rows_file, max_length=22), 1, tokenizer_of())
    assert first not in entries(home) and not first.with_suffix(".lock").exists()


def test_what_was_not_used_for_long_goes(rows_file, home):
    tokenized_rows(settings(rows_file), 1, tokenizer_of())
    (old,) = entries(home)
    home.joinpath(".writing-rows-x").mkdir()  # of a process that was killed
    home.joinpath("rows-x.lock").touch()
    old = old.rename(home / "rows-old")  # this process has the other one open
    shutil.copytree(old, home / "rows-unused")
    left = [home / name for name in (".writing-rows-x", "rows-x.lock", "rows-unused")]
    for path in left:
        os.utime(path, (0, 0))
    tokenized_rows(settings(rows_file, max_length=20), 1, tokenizer_of())
    assert old.exists() and not any(path.exists() for path in left)


def hold(pipe, index: Path) -> None:
    with index.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        pipe.send("held")
        time.sleep(600)


def test_the_size_of_the_cache_is_a_number_and_0_keeps_none(rows_file, home, made, monkeypatch):
    monkeypatch.setenv(token_cache.VARIABLE, "0")
    for _ in range(2):
        assert tokenized_rows(settings(rows_file), 1, tokenizer_of())[0].tokens.flags.writeable
    assert len(made) == 2 and not home.exists()
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv(token_cache.VARIABLE, wrong)
        with refused(f"{token_cache.VARIABLE}={wrong}", "GB"):
            tokenized_rows(settings(rows_file), 1, tokenizer_of())


def join_and_wait(pipe, rank: int, port: int, how: str) -> None:
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=1))
    if rank:
        time.sleep(3)  # longer than a collective waits
    try:
        token_cache.wait_for_all_ranks(succeeded=how == "made" or not rank)
        pipe.send("together")
    except UserError as error:
        pipe.send(str(error))
    pipe.recv()  # rank 0 has the store


@pytest.mark.slow
@pytest.mark.parametrize("how", ["made", "failed"])
def test_ranks_wait_for_a_slow_machine_and_notice_one_that_failed(how):
    port = free_port()
    ranks = [started(join_and_wait, rank, port, how) for rank in range(2)]
    said = "together" if how == "made" else "rank 1 could not load its rows: its own message says why"
    assert [pipe.recv() for _, pipe in ranks] == [said, "together"]
    for process, pipe in ranks:
        pipe.send("end")
        process.join(30)
