"""Files of rows, read as they are written: a cell or a JSON string is text, whatever it looks like.

CSV, TSV, JSON, JSON lines and Parquet, also compressed. Nothing is guessed ("01234", "NA" and "2024-01-02" stay what
they are), nothing is cached, and text is UTF-8 whatever the locale.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
READABLE = f"{', '.join(FORMATS)}, also with {', '.join(COMPRESSIONS)} added"
ROWS_AT_ONCE = 10_000  # as Python objects; then they are Arrow's, a tenth of the size
Row = tuple[int, dict[str, Any]]  # its number, from 1 on, and its values by column


class Unreadable(Exception):
    """What is wrong with a file, and where in it."""


class Number(str):
    """A number of a JSON file, as it is written."""


def format_of(path: Path) -> str | None:
    """The suffix that decides how to read `path`, in lower case and without its compression; None for another one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def read_files(
    paths: list[Path], wanted: set[str], texts: set[str], delimiter: str | None = None
) -> tuple[pa.Table, list[str]]:
    """The rows of `paths`, one file after another, and the names of all columns.

    The table may hold no other columns than those `wanted`; those of them that are `texts` hold text or null. A value
    that a row does not have is null. `delimiter`: of a CSV file, if it is not its suffix's. Raises `Unreadable`.
    """
    tables, names = [], {}
    for path in paths:
        try:
            table, columns = _read(path, wanted, texts, delimiter)
        except (Unreadable, OSError, EOFError, ValueError, lzma.LZMAError, pa.ArrowException) as error:
            where = f"{path.name}: " if len(paths) > 1 else ""
            raise Unreadable(where + _reason(error, format_of(path) or "")) from error
        tables.append(table)
        names |= dict.fromkeys(columns)
    return _concatenated(tables), list(names)


def _concatenated(tables: list[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise Unreadable(f"a column has several types: {str(error).splitlines()[0]}") from error


def _reason(error: Exception, form: str) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not in UTF-8 (byte 0x{error.object[error.start]:02x} is none of its): save it in that encoding"
    if isinstance(error, Unreadable):
        return str(error)
    line = next(iter(str(getattr(error, "strerror", None) or error).splitlines()), type(error).__name__)
    return f"cannot be read as {form[1:]}: {line}"


def _read(path: Path, wanted: set[str], texts: set[str], delimiter: str | None) -> tuple[pa.Table, list[str]]:
    form = format_of(path)
    if path.stat().st_size == 0:
        raise Unreadable("the file is empty")
    with COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb") as file:
        if form == ".parquet":
            stored = pq.ParquetFile(file)
            names = stored.schema_arrow.names
            table = stored.read([name for name in names if name in wanted])
            for i, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
                if pa.types.is_dictionary(column.type):  # categories: as the text that they stand for
                    table = table.set_column(i, name, column.cast(column.type.value_type))
            return table, names
        if form in (".csv", ".tsv"):
            return _table(_cells(file, delimiter or {".csv": ",", ".tsv": "\t"}[form]), wanted, texts)
        return _table(_json_rows(file), wanted, texts)


def _cells(file: BinaryIO, delimiter: str) -> Iterator[Row]:
    """Every cell is text, and an empty one is empty text."""
    csv.field_size_limit(2**31 - 1)  # its default is 128 kB per cell
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(filter(None, reader), [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise Unreadable(f"its first line names the column {twice[0]!r} twice")
        for number, cells in enumerate(filter(None, reader), 1):  # a blank line is not a row
            if len(cells) != len(header):
                raise Unreadable(f"line {reader.line_num} has {len(cells)} cells, and the first line {len(header)}")
            yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise Unreadable(f"cannot be read as csv: line {reader.line_num}: {error}") from None


def _json_rows(file: BinaryIO) -> Iterator[Row]:
    """The objects of a file with one a line, of one list of them, or of one object of columns."""
    first = next((line for line in file if line.strip()), b"")
    try:
        row = _decode(first)
    except Unreadable:
        row = None  # it takes several lines, or it is wrong
    several = any(line.strip() for line in file)
    file.seek(0)
    if isinstance(row, dict) and (several or not _is_columns(row)):
        for number, line in enumerate(
            (line for line in file if line.strip()), 1
        ):  # U+2028 ends no line: these are bytes
            yield number, _object(_decode(line, f"row {number}: "), number)
        return
    try:
        whole = _decode(file.read())
    except Unreadable:
        if first.lstrip().startswith(b"{"):
            _decode(first, "row 1: ")
        raise
    if isinstance(whole, dict) and _is_columns(whole):
        if len({len(column) for column in whole.values()}) > 1:
            raise Unreadable("its columns are not equally long")
        whole = [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield number, _object(row, number)


def _is_columns(row: dict) -> bool:
    """Whether `row` is all rows: each value a list of plain ones."""
    return bool(row) and all(
        isinstance(column, list) and not any(isinstance(value, (dict, list)) for value in column)
        for column in row.values()
    )


def _object(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise Unreadable(f'row {number} is not an object of columns, as in {{"text": "..."}}')
    return row


_NUMBERS_AS_WRITTEN = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=Number)


def _decode(text: bytes, where: str = "") -> Any:
    if not text.strip():
        raise Unreadable("it has no rows")
    try:
        return _NUMBERS_AS_WRITTEN.decode(text.removeprefix(codecs.BOM_UTF8).decode())
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if where else f"line {error.lineno}, column {error.colno}"
        raise Unreadable(f"cannot be read as json: {where}{error.msg} ({place})") from None


def _table(rows: Iterator[Row], wanted: set[str], texts: set[str]) -> tuple[pa.Table, list[str]]:
    names: dict[str, None] = {}
    tables = []
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        for _, row in chunk:
            names |= dict.fromkeys(row)
        kept = [name for name in names if name in wanted]
        columns = {name: pa.array([_value(name, number, row, texts) for number, row in chunk]) for name in kept}
        tables.append(pa.table(columns) if kept else pa.table({"": pa.nulls(len(chunk))}))
    if not tables:
        raise Unreadable("it has no rows")
    return _concatenated(tables), list(names)


def _value(name: str, number: int, row: dict[str, Any], texts: set[str]) -> Any:
    value = row.get(name)
    if type(value) is str or value is None:
        return value
    if name in texts:
        kind = {Number: "a number", bool: "true or false", list: "a list", dict: "an object"}[type(value)]
        raise Unreadable(f"row {number}: column {name} holds {kind}, {json.dumps(value)[:40]}, not text")
    return json.dumps(value) if isinstance(value, bool) else value
