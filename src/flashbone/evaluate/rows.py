"""Rows of a test set, checked with file and line, in the order of the file."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.formats import Example, check_columns, converter, detect
from flashbone.train.data.rows import BadRow, Row, all_bad, read_rows

QUESTION, ANSWER = "question", "answer"

T = TypeVar("T")


def read_examples(
    path: Path, task: str, columns: dict[str, str] | None = None, limit: int | None = None
) -> list[Example]:
    """The rows of a file as examples of `flashbone.train.data.formats`; a .txt file is one text.

    Args:
        path: A .txt file, or what `flashbone train` reads: .json, .jsonl, .csv, .tsv, .parquet, .bin/.idx.
        task: "sft" or "classification".
        columns: Our name of a column to the file's.
        limit: Read only so many rows.

    Raises:
        FormatError: rows are malformed, all of which are named, or there are none.
        ConfigError: a column is not there.
    """
    if path.suffix.lower() == ".txt":
        return [{"text": _text_file(path)}]
    rows = list(itertools.islice(_checked_file(path), limit))
    first = next((row[1] for row in rows if not isinstance(row, BadRow)), None)
    format, columns = ("classification" if task == "classification" else "text"), columns or {}
    if isinstance(first, dict) and first:
        check_columns(list(first), columns, str(path))
        format, columns = detect(list(first), columns, task, str(path))
    return _converted(rows, converter(format, columns), path)


def read_questions(
    path: Path, columns: dict[str, str] | None = None, limit: int | None = None
) -> list[tuple[str, str]]:
    """Questions and reference answers.

    Args:
        path: A file of rows.
        columns: The file's names for `question` and `answer`.
        limit: Read only so many rows.

    Raises:
        FormatError: rows are malformed, all of which are named, or there are none.
        ConfigError: `columns` has other names than these two.
    """
    columns = columns or {}
    if strange := sorted(set(columns) - {QUESTION, ANSWER}):
        raise ConfigError(f"columns: got {', '.join(strange)}, wanted {QUESTION} and {ANSWER}")
    names = columns.get(QUESTION, QUESTION), columns.get(ANSWER, ANSWER)

    def pair(row: Any) -> tuple[str, str]:
        if not isinstance(row, dict):
            raise FormatError(f"holds a {type(row).__name__}; an object with named columns was wanted")
        if missing := [name for name in names if row.get(name) is None]:
            raise FormatError(f"no {' and no '.join(map(repr, missing))}; it has {', '.join(row)}; name the columns")
        question, answer = row[names[0]], row[names[1]]
        if not isinstance(question, str) or not question.strip():
            raise FormatError(f"{names[0]!r} is {question!r:.40}; text was wanted")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise FormatError(f"{names[1]!r} is {answer!r:.40}; text or a number was wanted")
        return question, str(answer)

    return _converted(list(itertools.islice(_checked_file(path), limit)), pair, path)


def _checked_file(path: Path) -> Iterable[Row | BadRow]:
    if path.is_dir():
        raise FormatError(f"{path}: is a folder; a file of rows was wanted")
    return read_rows(path)


def _converted(rows: list[Row | BadRow], convert: Callable[[Any], T], path: Path) -> list[T]:
    """Every row converted, or one error for all that cannot be."""
    good: list[T] = []
    bad: list[str] = []
    for item in rows:
        try:
            if isinstance(item, BadRow):
                raise item
            good.append(convert(item[1]))
        except BadRow as error:
            bad.append(str(error))
        except FormatError as error:
            bad.append(f"{item[0]}: {error}")  # pyright: ignore[reportIndexIssue]
    if bad:
        raise all_bad(bad)
    if not good:
        raise FormatError(f"{path}: no rows")
    return good


def _text_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FormatError(f"{path}: no such data file") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if not text.strip():
        raise FormatError(f"{path}: no text")
    return text
