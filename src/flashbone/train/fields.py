"""Configurations as YAML files with `--dotted.field value` on top: plain data put into a dataclass, its types checked,
and unknown fields are named. Nothing in them can name a class or a function."""

import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from flashbone.errors import ConfigError, FormatError
from flashbone.files.plain_yaml import parse_yaml
from flashbone.files.records import fits, from_json, problems, wanted
from flashbone.files.sources import expanded

T = TypeVar("T")
Names = tuple[str, ...]  # of a field, from the outside in


def field_names(cls: Any) -> list[str]:
    """The fields of a dataclass that its constructor takes."""
    return [item.name for item in dataclasses.fields(cls) if item.init]


def changed(record: Any) -> dict[str, Any]:
    """The fields of a dataclass, and of those inside it, that differ from their defaults, as plain data."""
    plain = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if value != default:
            plain[item.name] = changed(value) if dataclasses.is_dataclass(value) else value
    return plain


def section(kind: type[T], name: str, fields: dict[str, Any]) -> T | None:
    """A section of a configuration as its dataclass; None if it is empty.

    Raises:
        ConfigError: a field is unknown or out of range.
    """
    if not fields:
        return None
    names = field_names(kind)
    if unknown := [name for name in fields if name not in names]:
        raise ConfigError(f"{name}: got {', '.join(unknown)}, wanted {', '.join(names)}")
    if wrong := problems(kind, fields):
        raise ConfigError("; ".join(f"{name}.{field}: {problem}" for field, problem in wrong.items()))
    return kind(**fields)


@dataclass(frozen=True)
class Schema(Generic[T]):
    """What a configuration may hold.

    Attributes:
        kind: the dataclass that is filled.
        sections: its fields that hold others, each with the dataclass that has these; empty they mean their defaults.
        elsewhere: names that exist but are decided elsewhere, with what to do instead.
        more: further names in sections, with their types.
        required: required names, though they have a default.
        paths: names that are places on disk, in which `~` and `$NAME` mean what they mean to a shell.
        lists: sections that may be a list, each with its field that then is this list.
    """

    kind: type[T]
    sections: Mapping[str, Any]
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    required: Collection[str] = ()
    paths: Collection[str] = ()
    lists: Mapping[str, str] = field(default_factory=dict)

    def fill(self, content: Mapping[str, Any], overrides: list[str], where: str) -> T:
        """The dataclass, filled from a file's content with the overrides on top.

        Args:
            content: What the file holds.
            overrides: `--dotted.field value`, or with `=`.
            where: The file, for messages.

        Raises:
            ConfigError: fields are unknown, missing or of another type; all are named.
        """
        types = self._types()
        flags = _flags(overrides)
        filled = self._without_lists(_copy(content))
        for path, text in flags:
            _put(filled, path, _value(text, self._type_at(path, types), "--" + ".".join(path)), where)
            filled = self._without_lists(filled)
        check_names([name for name, _ in self._named(filled)], list(types), where, self.elsewhere)
        filled = {name: value for name, value in filled.items() if value is not None or name not in self.sections}
        if missing := self._missing(filled):
            raise ConfigError(f"{where}: missing {', '.join(missing)}")
        values = [(name, value) for name, value in self._named(filled) if not fits(value, types[name])]
        if values:
            wrong = [
                f"{name}: got {value!r:.60}, wanted {wanted(types[name])}{_quotes(value, types[name])}"
                for name, value in values
            ]
            raise ConfigError(f"{where}: {'; '.join(wrong)}")
        for name in self.paths:
            try:
                _expand(filled, name.split("."))
            except ConfigError as error:
                raise ConfigError(f"{where}: {name}: {error}") from None
        try:
            return from_json(self.kind, filled, where)
        except FormatError as error:
            raise ConfigError(str(error)) from None

    def _without_lists(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content with each section that is a list as a mapping of it."""
        listed = {name: {key: content[name]} for name, key in self.lists.items() if isinstance(content.get(name), list)}
        return content | listed

    def _types(self) -> dict[str, Any]:
        top, types = get_type_hints(self.kind), {}
        for name in field_names(self.kind):
            types[name] = top[name]
            if name in self.sections:
                inner = get_type_hints(self.sections[name])
                types |= {f"{name}.{key}": inner[key] for key in field_names(self.sections[name])}
        return types | dict(self.more)

    def _named(self, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The values with their dotted names, those in sections for themselves."""
        for name, value in content.items():
            parts = value if isinstance(value, list) else [value]
            if name not in self.sections or not all(isinstance(part, dict) for part in parts):
                yield (f"{name!r} (write it as a field inside its section)" if "." in str(name) else str(name)), value
                continue
            for part in parts:
                yield from ((f"{name}.{key}", inner) for key, inner in part.items())

    def _type_at(self, path: Names, types: Mapping[str, Any]) -> Any:
        """The type of a field at any depth: deeper than sections, that of a mapping's values."""
        deep = 2 if path[0] in self.sections else 1
        kind = types.get(".".join(path[:deep]), Any)
        for _ in path[deep:]:
            mappings = [option for option in (kind, *get_args(kind)) if get_origin(option) is dict]
            kind = get_args(mappings[0])[1] if mappings else Any
        return kind

    def _missing(self, content: Mapping[str, Any]) -> list[str]:
        missing = []
        for name in self.needed(self.kind):
            if name not in self.sections:
                missing += [name] if content.get(name) in (None, "") else []
                continue
            value = content.get(name)
            parts = value if isinstance(value, list) and value else [value]
            inner = [*self.needed(self.sections[name]), *self.required_in(name)]
            if isinstance(value, dict) and value.get(self.lists.get(name, "")):
                inner = []
            missing += [
                f"{name}.{key}"
                for key in dict.fromkeys(inner)
                if any(not isinstance(part, dict) or part.get(key) is None for part in parts)
            ]
        return sorted(missing, key=lambda name: "." in name)

    @staticmethod
    def needed(kind: Any) -> list[str]:
        """The fields of a dataclass that have no default."""
        absent = dataclasses.MISSING
        return [item.name for item in dataclasses.fields(kind) if item.default is item.default_factory is absent]

    def required_in(self, section: str) -> list[str]:
        """The fields of a section that are required, though they have a default."""
        return [key for name, _, key in (entry.partition(".") for entry in self.required) if name == section]


def _flags(overrides: list[str]) -> list[tuple[Names, str]]:
    """The names and texts of `--a.b value` and `--a.b=value`."""
    words, flags = iter(overrides), []
    for word in words:
        name, equals, text = word.partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"{word!r}: wanted --dotted.field value")
        value = text if equals else next(words, None)
        if value is None:
            raise ConfigError(f"{name}: wanted a value after it")
        flags.append((tuple(name[2:].split(".")), value))
    return flags


def option_of(overrides: list[str], name: str) -> str | None:
    """The text that a field gets on the command line."""
    return dict(_flags(overrides)).get(tuple(name.split(".")))


def _value(text: str, kind: Any, flag: str) -> Any:
    """The value of a command-line word for a field: parsed as YAML, or the text itself if that does not fit."""
    try:
        value = parse_yaml(text, flag)
    except FormatError as error:
        if not fits(text, kind) or kind is Any or not text.isprintable():
            raise ConfigError(str(error)) from None
        return text
    return text if not fits(value, kind) and fits(text, kind) else value


def _quotes(value: Any, kind: Any) -> str:
    """The remedy where a word that YAML reads as something else was meant as text."""
    return "; put it in quotes if it is text" if isinstance(value, int | float) and fits("", kind) else ""


def _put(content: dict[str, Any], path: Names, value: Any, where: str) -> None:
    """Set a field at any depth."""
    for level, name in enumerate(path[:-1], 1):
        inner = content.get(name)
        if inner is None:
            inner = content[name] = {}
        if not isinstance(inner, dict):
            outer = ".".join(path[:level])
            raise ConfigError(f"{where}: --{'.'.join(path)}: {outer} is {inner!r:.60}, and has no fields")
        content = inner
    content[path[-1]] = value


def _expand(content: Any, path: list[str]) -> None:
    name, *inner = path
    for part in content if isinstance(content, list) else [content]:
        value = part.get(name) if isinstance(part, dict) else None
        if inner:
            _expand(value, inner)
        elif isinstance(value, str) and not value.startswith("{"):  # JSON, which some fields take besides
            part[name] = expanded(value)


def _copy(value: Any) -> Any:
    """A deep copy in which nothing is shared, not even by aliases."""
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def check_names(names: Collection[str], known: list[str], where: str, ours: Mapping[str, str]) -> None:
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
