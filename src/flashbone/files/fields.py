"""The fields of an adapter_config.json: what each may hold, and which of them mean the same in every method of PEFT."""

from __future__ import annotations

import re
import reprlib
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from flashbone.errors import FormatError

Check = tuple[Callable[[Any], bool], str]  # whether a value will do, and what is wanted instead


def is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_text(value: object) -> bool:
    """Whether it is a string that a file can hold: JSON may spell halves of characters."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def shown(value: object) -> str:
    """A value in short, on one line: a plain word without quotes."""
    return value if isinstance(value, str) and value.isidentifier() else reprlib.repr(value)


def is_names(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def is_pattern(value: object) -> bool:
    """Whether it is a regular expression, by itself and as a part of the one that PEFT builds around it."""
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


def size_for(name: str, pattern: Mapping[str, int], otherwise: int) -> int:
    """The block size of a module by a `rank_pattern`, of which PEFT takes the first key that matches."""
    return next((size for key, size in pattern.items() if re.match(_at_the_end(key), name)), otherwise)


def is_targeted(name: str, targets: str | list[str]) -> bool:
    """Whether `target_modules` means the module of this name, as PEFT matches."""
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or (is_pattern(targets) and re.fullmatch(targets, name) is not None)
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_probability(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


SIZE: Check = is_size, "a positive integer"
FLAG: Check = (lambda value: isinstance(value, bool)), "true or false"
NAMES: Check = is_names, "names"
PROBABILITY: Check = _is_probability, "a probability in [0, 1)"
_TEXT: Check = _or_null(lambda value: value == "" or is_text(value)), "a string or null"
_TARGETS: Check = _or_null(lambda value: value == "" or is_text(value) or is_names(value)), "names or a pattern"

# What every method of PEFT has, and what none but a person wrote.
SHARED: dict[str, Check] = {
    "task_type": _TEXT,
    "auto_mapping": (
        _or_null(lambda v: isinstance(v, dict) and all(x is None or is_text(x) for pair in v.items() for x in pair)),
        "names of a class",
    ),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "inference_mode": FLAG,
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "layers_to_transform": (
        _or_null(lambda v: _is_index(v) or (isinstance(v, list) and all(map(_is_index, v)))),
        "indices",
    ),
    "layers_pattern": _TARGETS,
    "modules_to_save": NAMES,
}


def check(file: Path, config: Mapping[str, Any], checks: Mapping[str, Check], known: Collection[str]) -> None:
    """Check the fields that a config has; one that is not known may only say that something is off.

    Args:
        file: Where it was read, for the error.
        config: The fields.
        checks: What each may hold.
        known: Fields that need no check.

    Raises:
        FormatError: fields hold something else, or are not known and set; all are named.
    """
    problems = [
        f"{name}: got {reprlib.repr(config[name])}, wanted {wanted}"
        for name, (will_do, wanted) in checks.items()
        if name in config and not will_do(config[name])
    ]
    strange = [name for name, value in config.items() if value and name not in checks and name not in known]
    if strange:
        named = ", ".join(f"{reprlib.repr(name)}: {reprlib.repr(config[name])}" for name in strange)
        problems.append(
            f"unknown fields, which may change what the adapter does: {named}; was it written by a newer version?"
        )
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}")
