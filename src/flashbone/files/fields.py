"""The fields of an adapter_config.json: what each may hold, and what it is where a file lacks it.

A schema is a table of them: a method's config is read, checked and written by its schema alone.
"""

from __future__ import annotations

import re
import reprlib
import warnings
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashbone.errors import FormatError


@dataclass(frozen=True)
class ConfigField:
    """One field.

    Attributes:
        fits: whether it may hold a value other than null.
        wanted: such values, in words.
        default: its value where a file lacks it or has null; it is also written where the adapter has no other.
    """

    fits: Callable[[Any], bool]
    wanted: str
    default: Any = None


Schema = Mapping[str, ConfigField]
ANY = ConfigField(lambda value: True, "anything")  # not written
_HEAD = ("peft_type", "peft_version")


def checked(
    file: Path,
    config: Mapping[str, Any],
    schema: Schema,
    unknown: str = "unknown fields, which may change what the adapter does: {}; was it written by a newer version?",
) -> dict[str, Any]:
    """The config with defaults, once all its fields have been checked.

    Args:
        file: Where it was read, for the error.
        config: The fields.
        schema: What each may hold.
        unknown: What is wrong with fields that are set but not in the schema.

    Raises:
        FormatError: fields hold something else, or are unknown and set; all are named.
    """
    defaults = {name: copy(field.default) for name, field in schema.items() if field.default is not None}
    filled = dict(config) | {name: default for name, default in defaults.items() if config.get(name) is None}
    problems = [
        f"{name}: got {reprlib.repr(filled[name])}, wanted {field.wanted}"
        for name, field in schema.items()
        if filled.get(name) is not None and not field.fits(filled[name])
    ]
    strange = {name: value for name, value in filled.items() if value and name not in schema and name not in _HEAD}
    if strange:
        named = ", ".join(f"{reprlib.repr(name)}: {reprlib.repr(value)}" for name, value in strange.items())
        problems.append(unknown.format(named))
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}")
    return filled


def defaults(schema: Schema) -> dict[str, Any]:
    """A config to be written, with the default of every field."""
    return {name: copy(field.default) for name, field in schema.items() if field is not ANY}


def shown(value: object) -> str:
    """A value in short, on one line: a plain word without quotes."""
    return value if isinstance(value, str) and value.isidentifier() else reprlib.repr(value)


def is_size(value: Any) -> bool:
    return _is_index(value) and value > 0


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    """Whether it is a string that a file can hold: JSON may spell halves of characters."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def is_pattern(value: object) -> bool:
    """Whether it is a regular expression, by itself and inside the one that PEFT builds around it."""
    if not is_text(value):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(str(value))
            re.compile(_at_the_end(str(value)))
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def by_pattern(name: str, pattern: Mapping[str, Any], otherwise: Any) -> Any:
    """The value for a module in a `rank_pattern`: PEFT takes the first key that matches."""
    return next((value for key, value in pattern.items() if re.match(_at_the_end(key), name)), otherwise)


def is_targeted(name: str, targets: str | list[str]) -> bool:
    """Whether `target_modules` means the module of this name, as PEFT matches."""
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or (is_pattern(targets) and re.fullmatch(targets, name) is not None)
    return any(f".{name}".endswith(f".{target}") for target in targets)


def patterns(fits: Callable[[Any], bool], wanted: str) -> ConfigField:
    """A field that gives modules their own value by regular expressions."""
    return ConfigField(
        lambda v: isinstance(v, dict) and all(is_pattern(key) and fits(value) for key, value in v.items()),
        f"regular expressions with {wanted}",
        {},
    )


def size(default: int) -> ConfigField:
    return ConfigField(is_size, "a positive integer", default)


def flag(default: bool) -> ConfigField:
    return ConfigField(lambda v: isinstance(v, bool), "true or false", default)


def bias(only: str) -> ConfigField:
    return ConfigField(lambda v: v in ("none", "all", only), f"'none', 'all' or '{only}'", "none")


NAMES = ConfigField(_is_names, "names", [])
PROBABILITY = ConfigField(
    lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < 1, "a probability in [0, 1)", 0.0
)
_TEXT = ConfigField(lambda v: v == "" or is_text(v), "a string or null")
_TARGETS = ConfigField(lambda v: v == "" or is_text(v) or _is_names(v), "names or a pattern")

# The fields of every method of PEFT.
SHARED: dict[str, ConfigField] = {
    "task_type": _TEXT,
    "auto_mapping": ConfigField(
        lambda v: isinstance(v, dict) and all(x is None or is_text(x) for pair in v.items() for x in pair),
        "names of a class",
    ),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "inference_mode": flag(False),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "layers_to_transform": ConfigField(
        lambda v: _is_index(v) or (isinstance(v, list) and all(map(_is_index, v))), "indices"
    ),
    "layers_pattern": _TARGETS,
    "modules_to_save": NAMES,
}
