"""JSON on disk with one schema: a dataclass, from which it is written and by whose types it is read."""

import dataclasses
import enum
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from flashbone.errors import FormatError
from flashbone.files.sources import read_json

T = TypeVar("T")
NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}


def read_record(kind: type[T], file: Path, remedy: str) -> T:
    """The dataclass that a JSON file holds.

    Raises:
        FormatError: the file holds something else; the message ends with the remedy.
    """
    try:
        return from_json(kind, read_json(file), str(file))
    except FormatError as error:
        raise FormatError(f"{error}; {remedy}") from None


def to_json(record: Any) -> str:
    """A dataclass as the text of a JSON file; numbers that are not finite are null."""
    return json.dumps(finite(dataclasses.asdict(record)), indent=2, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite, at any depth: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(kind: type[T], fields: Mapping[str, Any], where: str) -> T:
    """A dataclass from a JSON object. Other keys are ignored: a later version may write more.

    Raises:
        FormatError: fields are missing or of another type; all are named. Or the dataclass itself refuses them.
    """
    hints, names = get_type_hints(kind), [f.name for f in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    if wrong := problems(kind, fields):
        raise FormatError(f"{where}: {'; '.join(f'{name}: {problem}' for name, problem in wrong.items())}")
    values = {name: _converted(fields[name], hints[name], f"{where}, {name}") for name in names if name in fields}
    try:
        return kind(**values)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


def problems(kind: Any, fields: Mapping[str, Any]) -> dict[str, str]:
    """By name, the fields of a dataclass that are missing or of another type, and why."""
    hints, wrong = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in fields:
            if not fits(fields[field.name], hints[field.name]):
                wrong[field.name] = f"got {fields[field.name]!r:.60}, wanted {wanted(hints[field.name])}"
        elif field.default is field.default_factory is dataclasses.MISSING:
            wrong[field.name] = "is missing"
    return wrong


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON or YAML has a type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in inner)
    if origin in (list, tuple, set):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if hint in (int, float):
        is_number = isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
        return is_number and abs(value) < 1e308  # of integers, too: larger ones are no floats
    return hint is Any or isinstance(value, origin or hint)


def wanted(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(wanted, inner)))
    if origin is Literal:
        *first, last = map(str, inner)
        return f"{', '.join(first)} or {last}" if first else last
    if origin in (list, tuple, set):
        return f"a list, each {wanted(inner[0])}"
    if origin is dict and inner[1] is not Any:
        return f"an object (each value {wanted(inner[1])})"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " or ".join(str(member.value) for member in hint)
    return NAMES.get(hint, "an object")


def _converted(value: Any, hint: Any, where: str) -> Any:
    """A value that fits: its JSON objects as the dataclasses that the hint names, a list as a tuple where that is
    named."""
    kinds = [option for option in (hint, *get_args(hint)) if dataclasses.is_dataclass(option)]
    if isinstance(value, list) and any(get_origin(option) is tuple for option in (hint, *get_args(hint))):
        return tuple(value)
    if not kinds or value is None:
        return value
    if isinstance(value, list):
        return [from_json(kinds[0], item, where) for item in value]  # pyright: ignore[reportArgumentType]
    return from_json(kinds[0], value, where) if isinstance(value, dict) else value  # pyright: ignore[reportArgumentType]
