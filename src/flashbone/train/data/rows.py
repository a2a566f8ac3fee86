"""Rows of local files, one at a time, each with the place an error message can name: `train.jsonl:17`."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flashbone.errors import FormatError

Row = tuple[str, Any]  # where it stands, what it holds
SHOWN_BAD_ROWS = 5


class BadRow(FormatError):
    """One row that cannot be read or used; readers go on after it, so that several are reported at once."""


def all_bad(rows: Sequence[str]) -> FormatError:
    """One error for all bad rows, of which the first few are named."""
    more = f"; and {len(rows) - SHOWN_BAD_ROWS} more" if len(rows) > SHOWN_BAD_ROWS else ""
    return FormatError("; ".join(rows[:SHOWN_BAD_ROWS]) + more)


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """The rows of a .json, .jsonl, .csv, .parquet or .bin/.idx file; a malformed row comes as a BadRow in its place."""
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    readers |= {".bin": _binidx, ".idx": _binidx}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise FormatError(f"{path}: unknown kind of file; {', '.join(readers)} are read")
    try:
        yield from reader(path)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such data file") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None


def _jsonl(path: Path) -> Iterator[Row | BadRow]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                yield BadRow(f"{where}: not valid JSON: {error.msg} at column {error.colno}")


def _json(path: Path) -> Iterator[Row | BadRow]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text or "[]")
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under the name .json
            yield from _jsonl(path)
            return
        raise FormatError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if isinstance(rows, dict):  # a single line of JSON Lines
        rows = [rows]
    if not isinstance(rows, list):
        raise FormatError(f"{path}: holds a {type(rows).__name__}; a list of objects was wanted")
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def _csv(path: Path) -> Iterator[Row | BadRow]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        while True:
            number = reader.line_num + 1
            where = f"{path}:{number if reader.line_num else 2}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(f"{where}: not valid CSV: {error}")
                continue
            width = len(reader.fieldnames or [])
            if None in row:
                yield BadRow(f"{where}: more cells than the {width} columns; is a comma unquoted?")
            elif None in row.values():
                yield BadRow(f"{where}: fewer cells than the {width} columns")
            else:
                yield where, row


def _parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise FormatError(f"{path}: not a valid parquet file: {str(error).splitlines()[0]}") from None


def _binidx(path: Path) -> Iterator[Row]:
    from flashbone.train.data.binidx import BinIdx

    for number, ids in enumerate(BinIdx(path)):
        yield f"{path}: document {number}", {"input_ids": ids}
