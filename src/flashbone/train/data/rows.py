"""Rows of files and of hub datasets, one at a time, each with the place an error message can name: `train.jsonl:17`."""

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashbone.errors import FormatError, one_line
from flashbone.train.data.binidx import BinIdx, is_binidx, pair
from flashbone.train.data.parsing import (
    LONGEST,
    csv_cells,
    csv_columns,
    encoding_of,
    json_items,
    lines_of,
    list_under,
    parse_json,
)

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

Row = tuple[str, Any]  # its place and its content
Rows = Generator["Row | BadRow", None, None]


class BadRow(FormatError):
    """One row that cannot be read; readers continue after it, so that several are reported at once."""


def local_files(path: Path) -> tuple[Path, ...]:
    """The files on this disk whose rows `path` means; none where it is a dataset's hub id or folder."""
    if is_binidx(path):
        return pair(path)
    return (path,) if path.suffix.lower() in _READERS or path.is_file() else ()


def read_rows(path: Path) -> Rows:
    """The rows of a .json, .jsonl, .csv, .tsv, .parquet or .bin/.idx file; a malformed row comes as a BadRow.

    Raises:
        FormatError: no such file, a folder, an unknown kind of file, or one that is broken as a whole.
    """
    reader = _binidx if is_binidx(path) else _READERS.get(path.suffix.lower())
    if reader is None:
        kinds = ", ".join([*_READERS, ".bin", ".idx"])
        remedy = next((f"; {words}" for ends, words in _REMEDIES.items() if path.suffix.lower() in ends), "")
        problem = "is a folder" if path.is_dir() else "unknown kind of file"
        raise FormatError(f"{path}: {problem}; {kinds} are read{remedy}")
    with readable(path):
        yield from reader(path)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the errors of a missing file, a folder and another encoding into a FormatError."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FormatError(f"{path}: not a regular file; put the rows into a file")
    try:
        yield
    except FileNotFoundError:
        raise FormatError(f"{path}: no such data file") from None
    except IsADirectoryError:
        raise FormatError(f"{path}: is a folder; a file of rows was wanted") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None


def _jsonl(path: Path) -> Rows:
    with path.open(encoding=encoding_of(path)) as lines:
        for number, line in enumerate(lines_of(lines, path), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = where, parse_json(line)
            except json.JSONDecodeError as error:
                row = BadRow(f"{where}: not valid JSON: {error.msg} at column {error.colno}")
            except FormatError as error:
                row = BadRow(f"{where}: {error}")
            yield row


def _json(path: Path) -> Rows:
    text = path.read_text(encoding=encoding_of(path))
    try:
        for number, row in enumerate(_items(text, path), 1):
            where = f"{path}: row {number}"
            yield BadRow(f"{where}: {row}") if isinstance(row, FormatError) else (where, row)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise FormatError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
        yield from _jsonl(path)  # JSON Lines under the name .json


def _items(text: str, path: Path) -> Iterable[Any]:
    if text.lstrip().startswith("["):
        return json_items(text)
    try:
        rows = parse_json(text) if text.strip() else []
    except FormatError as error:
        if (place := list_under(text, "data")) is not None:  # to name the row
            return json_items(text, place)
        raise FormatError(f"{path}: {error}") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        if others := [name for name in rows if name != "data"]:
            log.warning("%s: keys not used: %s; the rows are those of data", path, ", ".join(others))
        return rows["data"]
    if isinstance(rows, dict):  # a single line of JSON Lines
        return [rows]
    if rows == []:
        return rows
    raise FormatError(f"{path}: holds a {type(rows).__name__}; a list of objects was wanted")


def _csv(path: Path) -> Rows:
    names, separator = csv_columns(path)
    if separator != ("\t" if path.suffix.lower() == ".tsv" else ","):
        log.info("%s: its cells are separated by %r", path, separator)
    with path.open(encoding=encoding_of(path), newline="") as lines:
        reader = csv_cells(lines_of(lines, path), separator)
        next(filter(None, reader), None)  # the names
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "field limit" in str(error):
                    raise FormatError(
                        f"{where}: a cell of more than {LONGEST >> 20} MiB; is a quote not closed?"
                    ) from None
                yield BadRow(f"{where}: not valid CSV: {error}; is a quote not closed, or not doubled?")
                continue
            if len(cells) == len(names):
                yield where, dict(zip(names, cells, strict=True))
            elif cells:
                more = "more" if len(cells) > len(names) else "fewer"
                hint = f"; is a {separator!r} unquoted?" if more == "more" else ""
                yield BadRow(f"{where}: {more} cells than the {len(names)} columns{hint}")


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if twice := sorted(name for name, times in Counter(names).items() if times > 1):
            raise FormatError(f"{path}: several columns have the name {', '.join(map(repr, twice))}; rename them")
        name_classes = _class_names(file.schema_arrow)
        for batch in file.iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                where = f"{path}: row {number}"
                yield name_classes(where, row)
    except (pyarrow.ArrowException, OSError) as error:  # an OSError without a number is of the file's content
        if getattr(error, "errno", None) is not None:
            raise
        raise FormatError(f"{path}: not a valid parquet file: {one_line(error, 200)}") from None


def _class_names(schema: Any) -> "Callable[[str, dict[str, Any]], Row | BadRow]":
    """Replaces class numbers by names, which datasets keeps in the schema of its files."""
    from datasets import Features

    try:
        features = Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError):  # the note is broken, the columns are fine
        features = {}
    return _naming(features)


def _naming(features: Mapping[str, Any]) -> "Callable[[str, dict[str, Any]], Row | BadRow]":
    """The same, by a dataset's features. Drops nested nulls, which Arrow adds for keys that only other rows have."""
    classes = {key: kind for key, kind in features.items() if hasattr(kind, "int2str")}
    several = {key: kind.feature for key, kind in features.items() if hasattr(getattr(kind, "feature", 0), "int2str")}
    nested = [key for key, kind in features.items() if _holds_objects(kind)]

    def name(where: str, row: dict[str, Any]) -> "Row | BadRow":
        for key, kind in classes.items():
            number = row[key]
            if number is not None and number >= len(kind.names):
                return BadRow(f"{where}: {key!r} is the class {number}, but only {len(kind.names)} have a name")
        names = {key: kind.int2str(row[key]) for key, kind in classes.items() if row[key] is not None and row[key] >= 0}
        names |= {key: [kind.int2str(number) for number in row[key] or ()] for key, kind in several.items()}
        return where, {**row, **names, **{key: _without_nulls(row[key]) for key in nested}}

    return name


def _binidx(path: Path) -> Rows:
    documents = BinIdx(path)
    for number, ids in enumerate(documents):
        yield f"{documents.index}: document {number}", {"input_ids": ids}


_READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}

_REMEDIES = {
    (".gz", ".zst", ".bz2", ".xz", ".zip"): "unpack it",
    (".xlsx", ".xls", ".ods"): "save the sheet as .csv",
    (".txt", ".md"): 'write each text as a line {"text": "..."} of a .jsonl file',
    (".arrow", ".feather", ".pkl", ".pickle"): "save it as .parquet",
}


def _holds_objects(kind: Any) -> bool:
    return isinstance(kind, dict) or (hasattr(kind, "feature") and _holds_objects(kind.feature))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def dataset_rows(dataset: "Dataset", name: str) -> Rows:
    """The rows of a dataset; numbers of classes become their names."""
    named = _naming(dataset.features or {})
    for number, row in enumerate(dataset, 1):
        assert isinstance(row, dict)
        yield named(f"{name}: row {number}", row)
