"""results.jsonl and the rows in runs' folders: read, and checked by the types of their dataclasses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashbone.compare.results import ComparisonResults, HeaderRow, MethodRow, RunRow
from flashbone.errors import FormatError
from flashbone.files.records import from_json
from flashbone.files.sources import json_object, read_json


def read_results(path: Path) -> ComparisonResults:
    """Read and check a results.jsonl, which may be unfinished and hold failed methods.

    Raises:
        FormatError: the file is missing, or a line is wrong: where, what was got, what was wanted.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as a results.jsonl: {error}") from error
    if not text:
        raise FormatError(f"{path}: the file is empty; wanted the output of `flashbone compare`")
    header, methods, runs = None, {}, {}
    # splitlines would also split at characters that a title may hold.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        where = f"{path}, line {number}"
        row = json_object(line.encode(), where, "; was the file cut off?")
        kind = row.get("kind")
        if (kind == "comparison") != (number == 1):
            raise FormatError(f"{where}: got {_short(kind)} as kind; the comparison must be line 1 and no other line")
        if number == 1:
            header = from_json(HeaderRow, row, where)
        elif kind == "method":
            method = from_json(MethodRow, row, where)
            if methods.setdefault(method.method, method) is not method:
                raise FormatError(f"{where}: the method {_short(method.method)} appears twice")
        elif kind == "run":
            run = from_json(RunRow, row, where)
            _check_run(run, methods, runs, where)
            runs[run.method, run.learning_rate, run.seed] = run
        else:
            raise FormatError(f"{where}: got {_short(kind)} as kind, wanted method or run")
    assert header is not None
    return ComparisonResults(header, tuple(methods.values()), tuple(runs.values()))


def _check_run(run: RunRow, methods: dict[str, MethodRow], runs: dict[tuple, RunRow], where: str) -> None:
    """A run belongs to a method, appears once, and scores as many test rows as the others, with which it is paired."""
    if run.method not in methods:
        raise FormatError(f"{where}: got a run of {_short(run.method)}, but no line above describes that method")
    if (run.method, run.learning_rate, run.seed) in runs:
        rate = f"learning rate {run.learning_rate} and seed {run.seed}"
        raise FormatError(f"{where}: the run of {run.method} with {rate} appears twice")
    others = {len(other.test_scores) for other in runs.values() if other.test_scores is not None}
    if run.test_scores is not None and others - {len(run.test_scores)}:
        rows = len(run.test_scores)
        raise FormatError(
            f"{where}: got scores of {rows} test rows, but a run above has {others.pop()}; wanted the same"
        )


def read_run(file: Path) -> RunRow | None:
    """The row that a run left in its folder; None where it has not ended.

    Raises:
        FormatError: the file is broken.
    """
    try:
        return from_json(RunRow, read_json(file), str(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except FormatError as error:
        raise FormatError(f"{error}; delete the file to repeat the run") from None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
