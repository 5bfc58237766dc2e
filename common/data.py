"""Data: load, tokenize, mask, pack, and distribute to ranks.

Which rows an optimizer step sees depends only on the data, the seed and the step, never on the number of ranks or on
the micro-batch: N ranks see exactly the batches that one would, and a resumed run continues where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import math
import re
import string
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch.utils.data import DataLoader, Dataset, Sampler

from common import pydoc_data, token_cache
from common.chat import assistant_spans
from common.config import BaseConfig, DataConfig
from common.errors import UserError
from common.hub import explain_hub_error, token
from common.loss import IGNORE, count_targets
from common.packing import pack_documents
from common.progress import track

if TYPE_CHECKING:
    import datasets
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

ROWS_AT_ONCE = 1000  # rows a call of the tokenizer takes


def load_rows(data: DataConfig, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training rows and held-out rows, disjoint, both drawn by the seed (many datasets are sorted by label).

    The held-out rows do not depend on `data.train_rows`. Raises `UserError` for a missing file, dataset, split or
    column, and if there are too few rows.
    """
    rows, *others = [_load_split(data, split) for split in _splits(data)]
    order = np.random.default_rng(seed).permutation(len(rows))
    if others:
        (held_out,) = others
        held_out = held_out.select(np.random.default_rng(seed).permutation(len(held_out))[: data.eval_rows])
    else:
        if len(rows) <= data.eval_rows:
            raise UserError(
                f"data.name={data.name} has {len(rows)} rows and data.eval_rows={data.eval_rows} are held out, "
                f"which leaves none to train on: lower data.eval_rows"
            )
        held_out, order = rows.select(order[: data.eval_rows]), order[data.eval_rows :]
    return rows.select(order[: data.train_rows or None]), held_out


def _splits(data: DataConfig) -> list[str]:
    """The split that trains, and the one that is held out if it is another one."""
    if data.eval_split == data.split:
        raise UserError(
            f"data.eval_split={data.eval_split} is data.split: held-out rows would train; set data.eval_split= (empty) "
            f"to hold out rows of that split"
        )
    return [data.split, data.eval_split] if data.eval_split else [data.split]


class Split(NamedTuple):
    """The rows of a split, not read yet."""

    read: Callable[[], datasets.Dataset]
    files: Sequence[tuple[str, Path]] = ()  # those that hold them, if they are read here, each with its split's name
    delimiter: str | None = None  # of these files, if it is not their suffix's

    def digest(self, data: DataConfig) -> str:
        """Equal for equal rows, whatever their files are called and when they were written."""
        if self.files:
            files = [(part, path.suffixes[-2:], token_cache.digest_of_file(path)) for part, path in self.files]
            return token_cache.digest(files, self.delimiter)
        table, (texts, others) = self.read().data.table, _columns(data)
        used = [name for name in table.column_names if name in {*texts.values(), *others}]
        return token_cache.digest_of_table(table.select(used))


def _load_split(data: DataConfig, split: str) -> datasets.Dataset:
    rows = _find_split(data, split).read()
    if len(rows) == 0:
        raise UserError(f"data.name={data.name}: split {split} has no rows")
    _check_columns(rows, data)
    return rows


def _find_split(data: DataConfig, split: str) -> Split:
    import datasets

    from common.readers import READABLE, format_of

    path = Path(data.name)
    is_path = path.is_absolute() or data.name.startswith(("./", "../")) or format_of(path) is not None
    if data.name == "pydoc":
        pydoc = functools.cache(lambda: datasets.Dataset.from_list(pydoc_data.rows()))
        found = Split(pydoc) if split == "train" else None
    elif path.is_file():
        if format_of(path) is None:
            raise UserError(f"data.name={data.name}: a file's name must end with one of {READABLE}")
        found = Split(lambda: _read(data, [path]), [(split, path)]) if split == "train" else None
    elif path.exists() and not path.is_dir():
        raise UserError(f"data.name={data.name} is neither a file nor a folder")
    elif is_path and not path.exists():
        raise UserError(f"data.name={data.name}: no such file or folder (the current one is {Path.cwd()})")
    else:
        found = _find_with_datasets(data, split)
    if found is None:
        raise UserError(
            f"data.name={data.name} has no split {split}: set data.split=train, and data.eval_split= (empty) to hold "
            f"out rows of it"
        )
    return found


def _find_with_datasets(data: DataConfig, split: str) -> Split:
    """A split of a folder or of the Hub, of which `datasets` knows which files are which split.

    It guesses types in JSON and CSV, and its cache believes a file's time of change: those files are read here.
    """
    import datasets

    from common.readers import format_of

    name, options = data.name, {}
    is_folder = Path(name).is_dir()
    if is_folder and glob.has_magic(str(Path(name).resolve())):  # which `datasets` would take for a pattern
        formats = Counter(suffix for path in Path(name).rglob("*") if (suffix := format_of(path)))
        (form, _), *_ = formats.most_common(1) or [(".jsonl", 0)]
        name = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}.get(form, "json")
        options = {"data_dir": glob.escape(str(Path(data.name).resolve()))}
    elif not is_folder and constants.HF_HUB_OFFLINE:
        with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
            name = snapshot_download(name, repo_type="dataset", local_files_only=True)
    try:
        builder = datasets.load_dataset_builder(name, data.subset or None, token=token(), **options)
        files = {str(part): paths for part, paths in (builder.config.data_files or {}).items()}
        is_ours = builder.name in ("json", "csv") or (builder.name == "parquet" and is_folder)
        is_ours &= all(format_of(Path(file)) for part in files.values() for file in part)
        if not is_ours or getattr(builder.config, "field", None):
            rows = datasets.load_dataset(name, data.subset or None, split=split, token=token(), **options)
            return Split(lambda: rows)
        splits = re.findall(r"(?:^|[+])(\w[\w.-]*)", split)
        if unknown := [part for part in splits if part not in files]:
            raise UserError(f"data.name={data.name} has no split {unknown[0]}: its splits are {', '.join(files)}")
        paths = {part: [_downloaded(file) for file in files[part]] for part in splits}
    except UserError:
        raise
    except Exception as error:
        raise explain_hub_error(error, "dataset", data.name) from error
    delimiter = builder.config.delimiter or builder.config.sep if builder.name == "csv" else None

    def read() -> datasets.Dataset:
        parts = {part: _read(data, paths[part], delimiter) for part in splits}
        try:
            sizes = {part: len(rows) for part, rows in parts.items()}
            slices = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
        except (ValueError, AssertionError) as error:
            raise UserError(f"data.name={data.name}: split {split}: {error}") from None
        chosen = [parts[each.splitname].select(range(sizes[each.splitname])[each.from_ : each.to]) for each in slices]
        return datasets.concatenate_datasets(chosen) if len(chosen) > 1 else chosen[0]

    return Split(read, [(part, path) for part in splits for path in paths[part]], delimiter)


def _downloaded(file: str) -> Path:
    """The place of `file`, one on this disk or on the Hub."""
    if on_hub := re.fullmatch(r"hf://datasets/([^@]+)@[^/]+/(.+)", file):
        return Path(hf_hub_download(*on_hub.groups(), repo_type="dataset", token=token()))
    return Path(file)


def _read(data: DataConfig, paths: list[Path], delimiter: str | None = None) -> datasets.Dataset:
    import datasets

    from common.readers import Unreadable, read_files

    texts, others = _columns(data)
    try:
        table, names = read_files(paths, {*texts.values(), *others}, {*texts.values()}, delimiter)
        _check_names(names, data)
        return datasets.Dataset(table)
    except Unreadable as error:
        raise UserError(f"data.name={data.name}: {error}") from error


def _columns(data: DataConfig) -> tuple[dict[str, str], list[str]]:
    """The columns that hold texts, by their keys, and the other columns that rows are made of."""
    if data.format == "messages":
        return {}, [data.messages_column]
    if data.format == "text":
        return {"data.text_column": data.text_column}, []
    texts = {"data.prompt_column": data.prompt_column, "data.response_column": data.response_column}
    return texts, [name for name in _template_columns(data) if name not in ("prompt", *texts.values())]


def _template_columns(data: DataConfig) -> list[str]:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(data.prompt_template) if field is not None]
    except ValueError:
        return []  # it cannot be filled in, as `render_prompts` will report
    return [re.split(r"[.\[]", field)[0] for field in fields]


def _check_names(names: list[str], data: DataConfig) -> None:
    texts, others = _columns(data)
    there = f"data.name={data.name} has the columns {', '.join(names)}"
    for key, column in (texts or {"data.messages_column": data.messages_column}).items():
        if column not in names:
            raise UserError(f"{key}={column}: {there}")
    for column in others:
        if column not in names:
            raise UserError(f"data.prompt_template={data.prompt_template!r} has {{{column}}}, but {there}, and prompt")


def _check_columns(rows: datasets.Dataset, data: DataConfig) -> None:
    """Raise `UserError` for a column that is missing, is not text, or has no value in some row."""
    import pyarrow.compute as pc

    _check_names(rows.column_names, data)
    texts, others = _columns(data)
    for column in (*texts.values(), *others):
        values = rows.data.column(column)
        if values.null_count:
            row = pc.index(pc.is_null(values), True).as_py() + 1
            way_out = f", or take {{{column}}} out of data.prompt_template" if column in others else ""
            raise UserError(
                f"data.name={data.name}: row {row}: column {column} has no value: give it one (it may be an empty text)"
                + (way_out if data.format == "prompt-response" else "")
            )
        if column in texts.values() and str(values.type) not in ("string", "large_string"):
            raise UserError(f"data.name={data.name}: column {column} holds {values.type}, not text")


@dataclass
class TokenizedRows(Dataset):
    """Token sequences in flat arrays; `rows[i]` is {"input_ids": int64 [length], "labels": int64 [length]}.

    A label is the token itself, or `IGNORE` if the token is not a target. Labels are not shifted. Blocks of several
    documents have "position_ids", int64 [length], as well: 0, 1, 2 … in each document.
    """

    tokens: np.ndarray  # int32 [all tokens]
    labels: np.ndarray  # int32 [all tokens]
    offsets: np.ndarray  # int64 [rows + 1]
    sources: np.ndarray | None = None  # int64 [rows]: the row of data that each came from; None for packed blocks
    counts: dict[str, Any] = field(default_factory=dict)  # what became of the rows of data; see `tokenize`
    positions: np.ndarray | None = None  # int32 [all tokens]: in the document, if blocks hold several

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        span = slice(self.offsets[index], self.offsets[index + 1])
        flat = {"input_ids": self.tokens, "labels": self.labels, "position_ids": self.positions}
        return {
            name: torch.from_numpy(array[span].astype(np.int64)) for name, array in flat.items() if array is not None
        }

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """Equal for equal data: a checkpoint remembers it, so that a run cannot continue with other rows."""
        digest = hashlib.sha256(self.tokens)
        digest.update(self.labels)
        digest.update(self.offsets)
        if self.positions is not None:
            digest.update(self.positions)
        return digest.hexdigest()[:16]


def tokenized_rows(
    data: DataConfig, seed: int, tokenizer: PreTrainedTokenizerFast, *, show_progress: bool = False
) -> tuple[TokenizedRows, TokenizedRows]:
    """Training rows and held-out rows as tokens; the latter never packed. `counts` of the former are those of both.

    Every rank calls this, and gets read-only arrays that all processes of a machine share: see `token_cache`.
    """
    try:
        rows = cached_rows(data, seed, tokenizer, show_progress=show_progress)
    except BaseException:
        token_cache.wait_for_all_ranks(succeeded=False)
        raise
    token_cache.wait_for_all_ranks(succeeded=True)
    return replace(rows["training"], counts={part: each.counts for part, each in rows.items()}), rows["held_out"]


def cached_rows(
    data: DataConfig, seed: int, tokenizer: PreTrainedTokenizerFast, *, show_progress: bool = False
) -> dict[str, TokenizedRows]:
    """The rows `training` and `held_out`, each with its own `counts`, from the cache of this machine."""

    def make(shown: bool) -> dict[str, TokenizedRows]:
        training, held_out = load_rows(data, seed)
        rows = tokenize(training, data, tokenizer, show_progress=shown)
        return {"training": rows, "held_out": tokenize(held_out, data, tokenizer, packing="none")}

    identity = None  # a slow tokenizer has no serialized form to digest
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for of_the_last_call in ("padding", "truncation"):
            del state[of_the_last_call]
        identity = _identity(data, seed) | {
            "tokenizer": state,
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "chat_template": tokenizer.chat_template,
        }
    return token_cache.made_once(identity, make, TokenizedRows, is_main=show_progress)


def held_out_rows(data: DataConfig, seed: int, *, is_main: bool) -> datasets.Dataset:
    """The held-out rows of `load_rows`, from the cache of this machine: an evaluation need not read all rows again."""
    import datasets

    def make(_: bool) -> dict[str, _Table]:
        table = load_rows(data, seed)[1].with_format("arrow")[:]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return {"held_out": _Table(np.frombuffer(sink.getvalue(), np.uint8))}

    kept = token_cache.made_once(_identity(data, seed) | {"what": "held-out rows"}, make, _Table, is_main=is_main)
    return datasets.Dataset(pa.ipc.open_stream(pa.py_buffer(kept["held_out"].stream)).read_all())


@dataclass
class _Table:
    stream: np.ndarray  # uint8: rows in Arrow's streaming format


def _identity(data: DataConfig, seed: int) -> dict[str, Any]:
    """All that the rows of `load_rows` depend on but this program."""
    return {
        "settings": asdict(replace(data, name="")),  # under another name they are the same rows
        "rows": [_find_split(data, split).digest(data) for split in _splits(data)],
        "seed": seed,
    }


def tokenize(
    rows: datasets.Dataset,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    packing: str | None = None,
    show_progress: bool = False,
) -> TokenizedRows:
    """Token sequences of at most `data.max_length` tokens, packed as `packing` (default: `data.packing`) asks for.

    Prompts are masked by position, so that a prompt's tokens are never targets and the EOS after a response always is,
    even if the pad token is the same. `counts` of the result are `rows` and `sequences`, and by reason what was
    `dropped` and `cut`. Raises `UserError` for a row that is not text, and if nothing is left.
    """
    packing = packing or data.packing
    wrapped = packing == "wrapped"
    encoders: dict = {"text": _encode_texts, "prompt-response": _encode_pairs, "messages": _encode_messages}
    encode = encoders[data.format]
    batches, dropped, cut = [], Counter(), Counter()
    no_target = "no text" if data.format == "text" else "nothing to learn in it"
    too_long = f"longer than data.max_length={data.max_length}"
    starts = range(0, len(rows), ROWS_AT_ONCE)
    for start in track(starts, "tokenizing", "k row", len(starts), shown=show_progress):
        batch = _flat(list(encode(rows[start : start + ROWS_AT_ONCE], start, data, tokenizer)))
        inside = batch.positions < (len(batch.tokens) if wrapped else data.max_length)
        # A row without a target teaches nothing, and the first token is predicted from nothing.
        target = batch.is_target & (batch.positions > 0)
        has_target, kept = batch.rows_with(target), batch.rows_with(target & inside)
        dropped[no_target] += int((~has_target).sum())
        dropped[f"its prompt is {too_long}"] += int((has_target & ~kept).sum())
        cut[too_long] += int((kept & batch.rows_with(~inside)).sum())
        taken = inside & kept[batch.rows]
        tokens, labels = batch.tokens[taken], np.where(batch.is_target, batch.tokens, IGNORE)[taken].astype(np.int32)
        lengths = np.bincount(batch.rows[taken], minlength=len(kept))[kept]
        batches.append((tokens, labels, lengths, start + np.flatnonzero(kept)))
    tokens, labels, lengths, sources = map(np.concatenate, zip(*batches, strict=True))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    dropped, cut = +dropped, +cut  # without those of which there are none
    counts: dict[str, Any] = {"rows": len(rows), "kept": len(sources), "dropped": dict(dropped), "cut": dict(cut)}
    if wrapped:
        rest = len(tokens) % data.max_length
        whole = len(tokens) // data.max_length
        tokens, labels = _full_blocks(tokens, labels, data.max_length)
        offsets = [*range(0, len(tokens) + 1, data.max_length)]
        counts["blocks"] = len(offsets) - 1
        counts["blocks_dropped"] = {"no target in it": whole - counts["blocks"]} if whole > counts["blocks"] else {}
        counts["tokens_dropped"] = {"they fill no block": rest} if rest else {}
    if len(offsets) < 2:
        raise UserError(
            f"data.name={data.name}: no sequence with a target token is left at data.max_length={data.max_length}: "
            + ("there are too few rows to fill one block" if wrapped else "prompts are too long, or texts are empty")
        )
    kept = None if wrapped else np.array(sources, np.int64)
    encoded_rows = TokenizedRows(tokens, labels, np.array(offsets, np.int64), kept, counts)
    return in_blocks(encoded_rows, data.max_length) if packing == "documents" else encoded_rows


def in_blocks(rows: TokenizedRows, size: int) -> TokenizedRows:
    """`rows` packed as documents into blocks of at most `size` tokens; `counts` say how full these are as well."""
    blocks = pack_documents(rows.tokens, rows.labels, rows.offsets, size)
    count, tokens = len(blocks.offsets) - 1, len(blocks.tokens)
    filling = {"blocks": count, "padding": count * size - tokens, "filled": round(tokens / (count * size), 4)}
    return TokenizedRows(
        blocks.tokens, blocks.labels, blocks.offsets, counts=rows.counts | filling, positions=blocks.positions
    )


class _Flat(NamedTuple):
    """The tokens of a batch of rows, one row after another, and for each of them:"""

    tokens: np.ndarray  # int32
    rows: np.ndarray  # int64: the row that it is in
    positions: np.ndarray  # int64: in that row
    is_target: np.ndarray  # bool
    number_of_rows: int

    def rows_with(self, which: np.ndarray) -> np.ndarray:
        """For each row, whether it has a token of `which`; bool [number_of_rows]."""
        return np.bincount(self.rows[which], minlength=self.number_of_rows) > 0


def _flat(encoded: list[tuple[list[int], int | list[bool]]]) -> _Flat:
    """Rows of tokens with the first target's position or, for each token, whether it is one."""
    lengths = np.array([len(ids) for ids, _ in encoded])
    tokens = np.fromiter(chain.from_iterable(ids for ids, _ in encoded), np.int32, lengths.sum())
    rows = np.repeat(np.arange(len(encoded)), lengths)
    positions = np.arange(len(tokens)) - (np.cumsum(lengths) - lengths)[rows]
    targets: list[Any] = [targets for _, targets in encoded]
    if isinstance(targets[0], int):
        is_target = positions >= np.array(targets)[rows]
    else:
        is_target = np.fromiter(chain.from_iterable(targets), np.bool_, len(tokens))
    return _Flat(tokens, rows, positions, is_target, len(encoded))


def describe_counts(counts: dict[str, Any]) -> str:
    """What became of rows, as text: how full blocks are, what was dropped and cut, and why."""
    said = f"{counts['kept']:,} of {counts['rows']:,} rows"
    if "blocks" in counts:
        said += f" in {counts['blocks']:,} blocks"
    if "filled" in counts:
        said += f", {counts['filled']:.1%} filled ({counts['padding']:,} tokens of padding)"
    for what, name in (("dropped", ""), ("blocks_dropped", " blocks"), ("tokens_dropped", " tokens"), ("cut", "")):
        how = "cut" if what == "cut" else "dropped"
        said += "".join(f", {n:,}{name} {how}: {reason}" for reason, n in counts.get(what, {}).items())
    return said


def _full_blocks(tokens: np.ndarray, labels: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut into blocks of `length`, all of the same shape: the tail that fills none is dropped.

    So is a block inside a long masked prompt: it has nothing to learn from.
    """
    count = len(tokens) // length
    tokens, labels = (flat[: count * length].reshape(count, length) for flat in (tokens, labels))
    kept = (labels[:, 1:] != IGNORE).any(axis=1)
    return tokens[kept].ravel(), labels[kept].ravel()


def _encode_texts(batch: dict[str, list], start: int, data: DataConfig, tokenizer) -> Iterator[tuple[list[int], int]]:
    texts = _texts(batch, data.text_column, start, data)
    written = [text for text in texts if text.strip()]
    before, after = _added_tokens(tokenizer)
    encoded = iter(_encode(tokenizer, written)["input_ids"] if written else ())
    eos = tokenizer.eos_token_id
    for text in texts:
        ids = next(encoded) if text.strip() else []
        yield (_with_eos(ids[: len(ids) - after], before, eos) if ids else []), 0


def _encode_pairs(batch: dict[str, list], start: int, data: DataConfig, tokenizer) -> Iterator[tuple[list[int], int]]:
    prompts = render_prompts(batch, data, start)
    responses = _texts(batch, data.response_column, start, data)
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    (_, after), eos = _added_tokens(tokenizer), tokenizer.eos_token_id
    for prompt, encoding in zip(prompts, _encodings(tokenizer, texts), strict=True):
        ids = encoding.ids[: len(encoding.ids) - after]
        first = _within(encoding, len(ids), len(prompt)).start
        yield _with_eos(ids, first, eos), first


def _encode_messages(
    batch: dict[str, list], start: int, data: DataConfig, tokenizer
) -> Iterator[tuple[list[int], list]]:
    conversations = [
        _conversation(messages, data, tokenizer, f"row {start + i}: ")
        for i, messages in enumerate(batch[data.messages_column])
    ]
    encodings = _encodings(tokenizer, [text for text, _, _ in conversations], add_special_tokens=False)
    for (text, spans, marked), encoding in zip(conversations, encodings, strict=True):
        ids = encoding.ids
        targets = [False] * len(ids)
        for span in spans:
            for i in _within(encoding, len(ids), *span):
                targets[i] = True
        # A template that marks the assistant's words knows how they end. Another one may end a turn with no EOS.
        if not marked and ids and targets[-1] and not text.rstrip().endswith(tokenizer.eos_token):
            ids, targets = [*ids, tokenizer.eos_token_id], [*targets, True]
        yield ids, targets


def _encode(tokenizer, texts: list[str], **options):
    # verbose=False: rows above the model's length are cut or packed below, so its warning would mislead.
    return tokenizer(texts, return_attention_mask=False, verbose=False, **options)


def _encodings(tokenizer, texts: list[str], **options) -> list[Encoding]:
    """The tokens of each text, with the characters that each stands for.

    A text is tokenized in one piece: tokens may join what one part of it ends with and the next begins with, and a
    tokenizer may put a space before whatever it is given.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"model.name: its tokenizer, {type(tokenizer).__name__}, does not report the characters of a token, "
            f"so prompt and response cannot be separated: save it as a fast one (tokenizer.json), or set "
            f"data.format=text"
        )
    return _encode(tokenizer, texts, **options).encodings


def _within(encoding: Encoding, length: int, start: int, stop: int | None = None) -> range:
    """The tokens, of the first `length`, that have a character from `start` on and before `stop`.

    A token that crosses such a border is one of them.
    """
    if stop is not None and start >= stop:
        return range(0)
    offsets = encoding.offsets[:length]
    first = bisect_right(offsets, start, key=_end)
    if _trimmed(offsets, first):
        begin, end = offsets[first - 1]
        if begin < end and end + _spaces(encoding.tokens[first - 1][::-1]) > start:
            first -= 1
    if stop is None:
        return range(first, length)
    after = bisect_left(offsets, stop, key=_begin)
    while _trimmed(offsets, after) and offsets[after][0] - _spaces(encoding.tokens[after]) < stop:
        after += 1
    return range(first, after)


_begin, _end = itemgetter(0), itemgetter(1)


def _trimmed(offsets: list[tuple[int, int]], i: int) -> bool:
    """Whether white space is left out of the offsets between token `i` and the one before, as some tokenizers do."""
    return 0 < i < len(offsets) and offsets[i][0] > offsets[i - 1][1]


def _spaces(token: str) -> int:
    """Spaces that a byte-level token begins with."""
    return len(token) - len(token.lstrip("Ġ"))


def _added_tokens(tokenizer) -> tuple[int, int]:
    """How many tokens the tokenizer puts before and after any text, such as BOS and EOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    before = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return before, max(0, len(full) - before - len(bare))


def _with_eos(ids: list[int], first: int, eos: int) -> list[int]:
    """`ids` with EOS at their end, unless the part from `first` on ends with one."""
    return ids if len(ids) > first and ids[-1] == eos else [*ids, eos]


def render_prompts(batch: dict[str, list], data: DataConfig, start: int = 0) -> list[str]:
    """The prompts of a batch of rows as the model sees them: `data.prompt_template` filled in."""
    columns = {name: batch[name] for name in batch if name in _template_columns(data)}
    columns["prompt"] = _texts(batch, data.prompt_column, start, data)
    filled = []
    for i in range(len(columns["prompt"])):
        try:
            row = {name: _as_text(values[i]) for name, values in columns.items()}
            filled.append(data.prompt_template.format(**row))
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"data.prompt_template={data.prompt_template!r}: cannot be filled in ({type(error).__name__}: {error}) "
                f"in row {start + i} (in the order of the seed); the columns are {', '.join(batch)}, and prompt"
            ) from None
    return filled


class _Nested:
    """A list or an object in a row: a template may take a value out of it, {choices[0]}, and not print it as Python."""

    def __init__(self, value: list | dict):
        self.value: Any = value

    def __getitem__(self, key: int | str) -> Any:
        return _as_text(self.value[key])

    def __format__(self, spec: str) -> str:
        raise TypeError(f"a {'list' if isinstance(self.value, list) else 'object'} is not text: {str(self.value)[:40]}")


def _as_text(value: Any) -> Any:
    """`value` as `format` may print it: as data are written, never as Python writes them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict)):
        return _Nested(value)
    if value is None or isinstance(value, bytes):
        raise TypeError("a column without a value" if value is None else "bytes are not text")
    return value


class Prompt(NamedTuple):
    """What a model is given."""

    text: str
    continuation: str  # what follows it in training: on this depends where the last token of a prompt ends


def prompt_and_reference(row: dict[str, Any], data: DataConfig, tokenizer) -> tuple[Prompt, str]:
    """What a model is given, and the answer that it should give, for a prompt-response or messages row.

    Of a conversation, the assistant's last turn is the answer.
    """
    if data.format == "messages":
        text, spans, _ = _conversation(row[data.messages_column], data, tokenizer)
        answers = [m["content"] for m in row[data.messages_column] if m["role"] == "assistant"]
        begin = spans[-1][0] if spans else len(text)
        return Prompt(text[:begin], text[begin:]), answers[-1]
    (text,) = render_prompts({name: [value] for name, value in row.items()}, data)
    return Prompt(text, row[data.response_column]), row[data.response_column]


def prompt_tokens(prompt: Prompt, data: DataConfig, tokenizer) -> tuple[list[int], str]:
    """The tokens before the first target, as training has them, and the end of the prompt that they do not spell.

    There is such an end if a token joins it with the continuation: an answer begins with it.
    """
    is_chat = data.format == "messages"  # a chat template has written its special tokens into the text already
    (encoding,) = _encodings(tokenizer, ["".join(prompt)], add_special_tokens=not is_chat)
    _, after = (0, 0) if is_chat else _added_tokens(tokenizer)
    offsets = encoding.offsets[: len(encoding.ids) - after]
    first = _within(encoding, len(offsets), len(prompt.text)).start
    spelled = offsets[first - 1][1] if first else 0
    if first < len(offsets):
        spelled = min(spelled, offsets[first][0])  # a tokenizer's own space has the characters of the token after it
    return encoding.ids[:first], prompt.text[spelled:]


def _conversation(messages: Any, data: DataConfig, tokenizer, where: str = "") -> tuple[str, list, bool]:
    """See `assistant_spans`. Raises `UserError` for anything but a conversation with an assistant in it."""
    where = f"data.name={data.name}: {where}column {data.messages_column}"
    if tokenizer.chat_template is None:
        raise UserError(
            f"data.format=messages: the tokenizer of model.name has no chat template; use {'prompt-response'!r}"
        )
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed or not any(m["role"] == "assistant" for m in messages):
        raise UserError(f"{where}: must be a list of {{role, content}} texts with an assistant's turn in it")
    # A row that lacks a key has it as null if others have it, and a template would print that.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return assistant_spans(tokenizer, messages, data.date)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _texts(batch: dict[str, list], column: str, start: int, data: DataConfig) -> list[str]:
    for i, value in enumerate(batch[column]):
        if not isinstance(value, str):
            raise UserError(
                f"data.name={data.name}: row {start + i} (in the order of the seed): column {column} holds "
                f"{type(value).__name__} {str(value)[:40]!r}, not text"
            )
    return batch[column]


def collate(rows: list[dict[str, torch.Tensor]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of what `rows` have ({"input_ids", "labels"}, …), int64 [rows, longest row], padded on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    values = {"input_ids": pad_id, "labels": IGNORE, "position_ids": 0}  # each place a document, which sees itself
    return {name: pad([row[name] for row in rows], batch_first=True, padding_value=values[name]) for name in rows[0]}


class StepSampler(Sampler):
    """For each optimizer step from `first_step` on, the rows of it that are this rank's.

    An epoch is a permutation by the seed and the epoch's number, cut into global batches; the rows that fill none are
    left out (others in each epoch). In a global batch, rows are sorted by length, so that little is padded.
    """

    def __init__(self, rows: TokenizedRows, cfg: BaseConfig, rank: int, world_size: int, first_step: int = 0):
        self.lengths, self.seed, self.size = rows.lengths, cfg.seed, cfg.train.global_batch_size
        self.rank, self.world_size, self.first_step = rank, world_size, first_step
        self.steps_per_epoch = len(rows) // self.size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"train.global_batch_size={self.size} is more than the {len(rows)} training sequences: lower it, "
                f"or use more data"
            )
        epochs = Fraction(str(cfg.train.epochs))  # as it is written: 1.1 * 50, in floating point, is more than 55
        self.total_steps = cfg.train.max_steps or max(1, math.ceil(epochs * self.steps_per_epoch))

    def __len__(self) -> int:
        return max(0, self.total_steps - self.first_step)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.array([])
        for step in range(self.first_step, self.total_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
            start = step % self.steps_per_epoch * self.size
            batch = order[start : start + self.size]
            batch = batch[np.argsort(self.lengths[batch], kind="stable")]
            yield batch[self.rank :: self.world_size].tolist()


class StepBatch(NamedTuple):
    """What a rank works on in one optimizer step."""

    micro_batches: list[dict[str, torch.Tensor]]
    targets: int  # tokens with a loss in these micro-batches
    tokens: int  # tokens in them, padding not counted


def step_loader(
    rows: TokenizedRows, cfg: BaseConfig, pad_id: int, rank: int, world_size: int, first_step: int = 0
) -> DataLoader:
    """An item of this loader is one optimizer step of this rank, a `StepBatch`.

    `loader.batch_sampler` knows `steps_per_epoch` and `total_steps`.
    """
    micro = cfg.train.micro_batch_size

    def step_batch(step_rows: list[dict[str, torch.Tensor]]) -> StepBatch:
        micro_batches = [collate(step_rows[i : i + micro], pad_id) for i in range(0, len(step_rows), micro)]
        targets = sum(count_targets(batch["labels"]) for batch in micro_batches)
        return StepBatch(micro_batches, targets, sum(len(row["input_ids"]) for row in step_rows))

    return DataLoader(
        rows,
        batch_sampler=StepSampler(rows, cfg, rank, world_size, first_step),
        collate_fn=step_batch,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: the loader then draws nothing from the run's random numbers
    )
