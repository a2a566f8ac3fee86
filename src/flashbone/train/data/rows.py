"""Rows of files and of hub datasets, one at a time, each with the place an error message can name: `train.jsonl:17`."""

import csv
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.binidx import BinIdx, is_binidx, pair

if TYPE_CHECKING:
    from datasets import Dataset

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
        raise FormatError(f"{path}: {'is a folder' if path.is_dir() else 'unknown kind of file'}; {kinds} are read")
    with readable(path):
        yield from reader(path)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the errors of a missing file, a folder and another encoding into a FormatError."""
    try:
        yield
    except FileNotFoundError:
        raise FormatError(f"{path}: no such data file") from None
    except IsADirectoryError:
        raise FormatError(f"{path}: is a folder; a file of rows was wanted") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None


def _jsonl(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                yield BadRow(f"{where}: not valid JSON: {error.msg} at column {error.colno}")


def _json(path: Path) -> Rows:
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


def _csv(path: Path) -> Rows:
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


def _parquet(path: Path) -> Rows:
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


def _binidx(path: Path) -> Rows:
    documents = BinIdx(path)
    for number, ids in enumerate(documents):
        yield f"{documents.index}: document {number}", {"input_ids": ids}


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}


def open_dataset(path: str, subset: str | None, split: str) -> "Dataset":
    """A dataset of the hub, or of a folder.

    Raises:
        ConfigError: it cannot be loaded, or its rows come from a script.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(path, subset, split=split)  # pyright: ignore[reportReturnType]
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"data.path {path} ({split}): no such file, and no dataset of that id could be loaded: {reason}"
        ) from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        script = str(error).rpartition(" ")[2]
        raise ConfigError(
            f"data.path {path}: its rows come out of a script, {script}, and scripts are never run; "
            "give them as a .jsonl, .csv or .parquet file"
        ) from None


def dataset_rows(dataset: "Dataset", name: str) -> Rows:
    """The rows of a dataset; numbers of classes become their names."""
    classes = {key: kind for key, kind in dataset.features.items() if hasattr(kind, "int2str")}
    for number, row in enumerate(dataset, 1):
        assert isinstance(row, dict)
        names = {key: kind.int2str(row[key]) for key, kind in classes.items() if row[key] is not None and row[key] >= 0}
        yield f"{name}: row {number}", {**row, **names}
