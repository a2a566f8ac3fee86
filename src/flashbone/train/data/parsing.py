"""Rows out of JSON and CSV: strict where a lax reader would silently lose or change something."""

import contextlib
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from flashbone.errors import FormatError

MAX_DEPTH = 100  # of lists and objects in a row; what reads it later recurses
DEEP = f"is nested more than {MAX_DEPTH} levels deep"
# Half a character, without the other half that makes it one.
_HALVES = re.compile(r"\\u[dD][89a-fA-F]")  # of characters; two make one
_BLANKS = re.compile(r"[ \t\n\r]*")
SEPARATORS = (",", ";", "\t", "|")
LONGEST = 64 << 20  # characters of a line of rows, and of a cell of CSV
LONGEST_NAMES = 1 << 20  # characters of a line with the names of columns


def lines_of(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of an open file.

    Raises:
        FormatError: one is longer than `LONGEST`.
    """
    for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), ""), 1):
        if len(line) > LONGEST:
            raise FormatError(f"{path}:{number}: a line of more than {LONGEST >> 20} MiB; is it damaged?")
        yield line


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is none.
        FormatError: it is, and cannot be kept: a key twice, NaN, a number of thousands of digits, half a character, or
            too many levels.
    """
    value, end = _value_at(text, _start(text, 0))
    end = _start(text, end)
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def encoding_of(path: Path) -> str:
    """The encoding of a text file: UTF-16 where it begins with the mark of it, as Excel writes it, and else UTF-8."""
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def list_under(text: str, key: str) -> int | None:
    """Where the list begins that a JSON object has under a key; None if there is none."""
    place = _start(text, _start(text, 0) + 1)
    with contextlib.suppress(ValueError, RecursionError):
        while text[place : place + 1] == '"':
            name, place = _LAX.raw_decode(text, place)
            place = _start(text, _start(text, place) + 1)
            if name == key and text[place : place + 1] == "[":
                return place
            place = _start(text, _LAX.raw_decode(text, place)[1])
            place = _start(text, place + 1)
    return None


def json_items(text: str, inside: int | None = None) -> Iterator[Any]:
    """The items of a JSON list; an item that cannot be kept becomes a FormatError with the reason.

    Args:
        text: The text.
        inside: Where the list begins, if it is a part of the text only.

    Raises:
        json.JSONDecodeError: it is no JSON list.
    """
    place = _start(text, (_start(text, 0) if inside is None else inside) + 1)
    while text[place : place + 1] != "]":
        try:
            value, end = _value_at(text, place)
        except FormatError as error:
            value, end = error, _end_of(text, place)
        yield value
        if end is None:
            return
        place = _start(text, end)
        if text[place : place + 1] == ",":
            place = _start(text, place + 1)
            if text[place : place + 1] == "]":
                raise json.JSONDecodeError("Expecting value", text, place)
        elif text[place : place + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    place = _start(text, place + 1)
    if place < len(text) and inside is None:
        raise json.JSONDecodeError("Extra data", text, place)


def _end_of(text: str, place: int) -> int | None:
    """Where a value ends that cannot be kept; None where it is too deep to tell."""
    try:
        return _LAX.raw_decode(text, place)[1]
    except RecursionError:
        return None


def _start(text: str, place: int) -> int:
    """Where the next value begins."""
    blanks = _BLANKS.match(text, place)
    assert blanks
    return blanks.end()


def _value_at(text: str, place: int) -> tuple[Any, int]:
    """The value that begins here, and where it ends."""
    try:
        value, end = _STRICT.raw_decode(text, place)
    except (json.JSONDecodeError, FormatError):
        raise
    except ValueError:  # Python's limit on digits
        raise FormatError("holds a number of thousands of digits; write it as a text") from None
    except RecursionError:
        raise FormatError(DEEP) from None
    if text.count("[", place, end) + text.count("{", place, end) > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise FormatError(DEEP)
    if _HALVES.search(text, place, end) and (half := _half(value)):
        raise FormatError(f"holds {half}, half of a character that takes two")
    return value, end


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise FormatError(f"has the key {twice!r} twice")
    return content


def _refused(constant: str) -> Any:
    raise FormatError(f"holds {constant}, which is not JSON; write null, or a number")


def _half(value: Any) -> str | None:
    """A half of a character in the texts of a value, escaped."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            rest += [*item, *item.values()]
        elif isinstance(item, list):
            rest += item
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as error:
                return item[error.start].encode("unicode_escape").decode()
    return None


def _depth(value: Any) -> int:
    """How deep lists and objects are in each other, up to one more than the limit."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        level = [item for item in level if isinstance(item, dict | list)]
        depth += bool(level)
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


_LAX = json.JSONDecoder(parse_int=str)
_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refused)


def csv_columns(path: Path) -> tuple[list[str], str]:
    """The names of the columns of a CSV file, and what separates its cells: the usual separator, unless that makes one
    column and another makes several.

    Raises:
        FormatError: two columns have one name, or the first line is no CSV or too long.
    """
    with path.open(encoding=encoding_of(path), newline="") as lines:
        if len(next((line for line in lines_of(lines, path) if line.strip()), "")) > LONGEST_NAMES:
            raise FormatError(f"{path}: the names of the columns take more than {LONGEST_NAMES >> 20} MiB; is it CSV?")
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    headers = {}
    for separator in (usual, *SEPARATORS):
        with path.open(encoding=encoding_of(path), newline="") as lines, contextlib.suppress(csv.Error):
            headers[separator] = next(filter(None, csv_cells(lines_of(lines, path), separator)), [])
    if not headers:
        raise FormatError(f"{path}:1: not valid CSV: a quote that is not closed, or in the middle of a name")
    separator = next((other for other, names in headers.items() if len(names) > 1), next(iter(headers)))
    names = headers[separator]
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise FormatError(f"{path}: several columns have the name {', '.join(map(repr, twice))}; rename or remove them")
    return names, separator


def csv_cells(lines: Iterable[str], separator: str) -> Any:
    """A reader of CSV that refuses stray quotes, which would join cells or rows, and takes cells of up to `LONGEST`."""
    csv.field_size_limit(LONGEST)  # of the process; nothing else sets it
    return csv.reader(lines, delimiter=separator, strict=True)
