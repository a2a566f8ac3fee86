"""Configurations as YAML files with `--dotted.field value` on top: reading them, naming every field that is none."""

import argparse
import contextlib
import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flashbone.errors import ConfigError, FormatError

T = TypeVar("T")


def field_names(cls: Any) -> list[str]:
    """The fields of a dataclass that its constructor takes."""
    return [item.name for item in dataclasses.fields(cls) if item.init]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: there is no such file.
        FormatError: it is no YAML mapping; the message gives the line.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; a YAML file was wanted") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise FormatError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        got = "nothing" if content is None else type(content).__name__
        raise FormatError(f"{path}: holds {got}; a mapping with model, data and output was wanted")
    return content


def keys(content: dict[str, Any], sections: Collection[str]) -> list[str]:
    """The dotted names in a YAML mapping, two levels deep: `model`, `data.path`, `training.max_steps`."""
    names = []
    for key, value in content.items():
        nested = key in sections and isinstance(value, dict)
        names += [f"{key}.{inner}" for inner in value] if nested else [str(key)]
    return names


def flag_names(overrides: list[str]) -> list[str]:
    """The dotted names behind the `--flags`, two levels deep: `--data.columns.prompt=q` is `data.columns`."""
    flags = [flag[2:].split("=", 1)[0] for flag in overrides if flag.startswith("--")]
    return [".".join(flag.split(".")[:2]) for flag in flags]


def check_names(names: list[str], known: list[str], where: str, ours: Mapping[str, str]) -> None:
    """Raise one ConfigError that names every field that nobody would read, with the nearest that exist.

    Args:
        names: Dotted names in the file and on the command line.
        known: Those that exist.
        where: The file, for the message.
        ours: Names that exist but are decided elsewhere, with what to do instead.
    """
    known = [name for name in known if name not in ours]
    problems = []
    for name in dict.fromkeys(names):
        if name in ours:
            problems.append(f"{name} ({ours[name]})")
        elif name not in known:
            problems.append(f"{name}{_hint(name, known)}")
    if problems:
        plural = "s" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: unknown field{plural}: {'; '.join(problems)}")


def _hint(name: str, known: list[str]) -> str:
    section = name.rsplit(".", 1)[0] + "." if "." in name else ""
    rivals = [other for other in known if other.startswith(section)]
    near = difflib.get_close_matches(name, rivals, n=2) or difflib.get_close_matches(name, known, n=1)
    if not near:  # right name, wrong section: `max_steps` at the top
        near = [other for other in known if other.rsplit(".", 1)[-1] == name]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def parse(cls: type[T], content: dict[str, Any], overrides: list[str], where: str, sections: Collection[str]) -> T:
    """The configuration of this dataclass: what a file gives, with the overrides on top.

    Args:
        cls: A dataclass.
        content: What the file holds.
        overrides: `--dotted.field value`, or with `=`.
        where: The file, for messages.
        sections: Fields that hold others; empty in the file they mean their defaults, and numbers in them that YAML
            1.1 leaves as strings become numbers.

    Raises:
        ConfigError: a value is of the wrong type, or names a class.
    """
    from jsonargparse import ArgumentParser

    refuse_classes(content, overrides, where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None)
    filled = {key: value for key, value in content.items() if value is not None or key not in sections}
    try:
        merged = parser.parse_args(overrides, namespace=parser.parse_object(filled))
        plain = parser.instantiate(merged)
    except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        raise ConfigError(f"{where}: {one_line(str(error))}") from None
    fields = {name: plain[name] for name in field_names(cls)}
    return cls(**{name: numbers(value) if name in sections else value for name, value in fields.items()})


def refuse_classes(content: dict[str, Any], overrides: list[str], where: str) -> None:
    """Refuse `class_path`, wherever it is: jsonargparse would import what it names, and make an object of it.

    Raises:
        ConfigError: there is one. A configuration is plain data.
    """
    import yaml

    values: list[Any] = [content]
    for word in overrides:
        name, _, value = word.partition("=")
        values.append(name.split("."))
        with contextlib.suppress(yaml.YAMLError):  # the parser says what is wrong with it
            values.append(yaml.safe_load(value if word.startswith("--") else word))
    if any(_names_class(value) for value in values):
        raise ConfigError(f"{where}: class_path is refused: a configuration is plain data and makes no objects")


def _names_class(value: Any) -> bool:
    if isinstance(value, dict):
        return "class_path" in value or any(map(_names_class, value.values()))
    return isinstance(value, list) and ("class_path" in value or any(map(_names_class, value)))


def numbers(value: Any) -> Any:
    """Numbers that YAML 1.1 leaves as strings, such as 2e-4, at any depth."""
    if isinstance(value, dict):
        return {key: numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbers(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
        return float(value) if re.search(r"[.eE]", value) else int(value)
    return value


def one_line(message: str) -> str:
    """jsonargparse's message without its own vocabulary."""
    message = re.sub(r"<class '(\w+)'>", r"\1", message.replace('Parser key "', '"').replace("typing.", ""))
    return " ".join(message.split())
