"""The fields of an adapter_config.json: what each may hold, and what it is where a file lacks it.

A schema is a table of them: a method's config is read, checked and written by its schema alone.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashbone.errors import FormatError, visible
from flashbone.files import patterns
from flashbone.files.names import dotted_endings


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
_MOST_NAMES = 20_000


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


def _is_few_names(value: object) -> bool:
    return _is_names(value) and len(value) <= _MOST_NAMES  # pyright: ignore[reportArgumentType]


def _are_modules(value: Any) -> bool:
    return _is_few_names(value) and all(is_pattern(name) for name in value if not re.fullmatch(r"[\w.-]*", name))


def _are_targets(value: object) -> bool:
    return value == "" or _is_names(value) or (is_text(value) and not patterns.problem(str(value)))


def _are_layers(value: object) -> bool:
    return value == "" or is_pattern(value) or (_is_few_names(value) and all(map(is_pattern, value)))  # pyright: ignore


def is_pattern(value: object) -> bool:
    """Whether this is a regular expression that matches in bounded time, alone and where PEFT uses it."""
    return is_text(value) and not patterns.problem(str(value), is_key=True)


def by_pattern(name: str, pattern: Mapping[str, Any], otherwise: Any) -> Any:
    """The value for a module in a `rank_pattern`: PEFT takes the first key that matches."""
    return patterns.first(pattern, name, otherwise)


def is_targeted(name: str, targets: str | Collection[str]) -> bool:
    """Whether `target_modules` means the module of this name, as PEFT matches."""
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or (is_pattern(targets) and patterns.fullmatch(targets, name))
    return any(ending in targets for ending in dotted_endings(name))


_PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_NAMES_OR_PATTERN = ("target_modules", "exclude_modules")  # a list of these is of names


def settle_patterns(config: Any, names: Collection[str]) -> None:
    """Put what the patterns of a PEFT config of any method mean, of the names of a model's modules, in their place:
    PEFT matches with Python's matcher, which can take far longer than ours."""
    for field in _NAMES_OR_PATTERN:
        if isinstance(pattern := getattr(config, field, None), str) and pattern.lower() != "all-linear":
            setattr(config, field, patterns.for_python(pattern, names))
    for field, table in vars(config).items():
        if field.endswith("_pattern") and isinstance(table, dict):
            values = {name: patterns.first(table, name, None) for name in names}
            settled = {f"{re.escape(name)}": value for name, value in values.items() if value is not None}
            setattr(config, field, settled)


def refuse_slow_patterns(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter's config, of any PEFT method, whose regular expressions could take forever.

    Raises:
        FormatError: some could; all are named.
    """
    problems = []
    for name, value in config.items():
        listed = [value] if isinstance(value, str) else value if isinstance(value, (list, dict)) else []
        if (name not in _PATTERNS and not name.endswith("_pattern")) or (name in _NAMES_OR_PATTERN and listed is value):
            continue
        if len(listed) > patterns.MOST_PATTERNS:
            problems.append(f"{name}: got {len(listed):,} patterns, wanted at most {patterns.MOST_PATTERNS:,}")
        else:
            wrong = {text: why for text in listed if isinstance(text, str) and (why := patterns.problem(text))}
            problems += [f"{name}: {visible(text)} is {why}" for text, why in wrong.items()]
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}")


def patterned(fits: Callable[[Any], bool], wanted: str) -> ConfigField:
    """A field that gives modules their own value by regular expressions."""

    def are_patterns(value: Any) -> bool:
        few = isinstance(value, dict) and len(value) <= patterns.MOST_PATTERNS
        return few and all(is_pattern(key) and fits(inner) for key, inner in value.items())

    words = f"at most {patterns.MOST_PATTERNS:,} regular expressions, none of which could take forever, with {wanted}"
    return ConfigField(are_patterns, words, {})


def size(default: int) -> ConfigField:
    return ConfigField(is_size, "a positive integer", default)


def flag(default: bool) -> ConfigField:
    return ConfigField(lambda v: isinstance(v, bool), "true or false", default)


def bias(only: str) -> ConfigField:
    return ConfigField(lambda v: v in ("none", "all", only), f"'none', 'all' or '{only}'", "none")


NAMES = ConfigField(_is_few_names, f"names, at most {_MOST_NAMES:,}", [])
MODULES = ConfigField(_are_modules, f"names of modules, at most {_MOST_NAMES:,}", [])
PROBABILITY = ConfigField(
    lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < 1, "a probability in [0, 1)", 0.0
)
_TEXT = ConfigField(lambda v: v == "" or is_text(v), "a string or null")
_TARGETS = ConfigField(_are_targets, "names or a regular expression that could not take forever")
_LAYERS = ConfigField(_are_layers, "regular expressions that could not take forever")

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
    "layers_pattern": _LAYERS,
    "modules_to_save": MODULES,
}
