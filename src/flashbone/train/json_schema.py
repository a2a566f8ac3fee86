"""The JSON schema of a configuration, for editors: made from the dataclasses that it fills."""

import dataclasses
import enum
import inspect
import itertools
import re
import textwrap
import tokenize
import types
from collections.abc import Iterator, Mapping
from io import StringIO
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flashbone.train.data.layouts import FORMATS
from flashbone.train.fields import Schema, field_names
from flashbone.variants import VARIANTS

DRAFT = "http://json-schema.org/draft-07/schema#"  # what editors know best
# Of fields that are any text for the reader.
CHOICES = {
    "adapter.variant": [*VARIANTS],
    "data.format": ["auto", *FORMATS],
    "adapter.bias": ["none", "all", "bone_only"],
}
_LONGEST = 200  # characters of a description
_WORDS = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


def json_schema(title: str, by_task: Mapping[str, Schema[Any]]) -> dict[str, Any]:
    """The JSON schema of a configuration's file.

    Args:
        title: What it is.
        by_task: What it may hold for each task, of which sections alone may differ; the first is for files that name
            no task.
    """
    shared: dict[str, Any] = {}
    tasks = {task: _Writer(schema, shared).top() for task, schema in by_task.items()}
    whole = next(iter(tasks.values()))
    fields = whole["properties"]
    differing = [name for name in fields if any(other["properties"][name] != fields[name] for other in tasks.values())]
    rules = []
    for number, (task, entry) in enumerate(tasks.items()):
        named = {"required": ["task"]} if number else {}
        its_own = {name: entry["properties"][name] for name in differing}
        rules.append({"if": {"properties": {"task": {"const": task}}, **named}, "then": {"properties": its_own}})
    common = {name: {} if name in differing else value for name, value in fields.items()}
    return {"$schema": DRAFT, "title": title, **whole, "properties": common, "allOf": rules, "definitions": shared}


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes what one schema allows; the fields of sections go to `shared`, each once."""

    schema: Schema[Any]
    shared: dict[str, Any]

    def top(self) -> dict[str, Any]:
        """The mapping of the whole file."""
        kind, types = self.schema.kind, get_type_hints(self.schema.kind)
        notes, fields = descriptions(kind), {}
        for name in field_names(kind):
            if name in self.schema.sections:
                fields[name] = self._section(name)
            elif name not in self.schema.elsewhere:
                fields[name] = shape(types[name])
            fields[name] |= {"description": notes[name]} if name in notes else {}
        needed = [name for name in self.schema.needed(kind) if name in fields]
        needed += [name for name, *_ in (entry.split(".") for entry in self.schema.required) if name not in needed]
        return {"type": "object", "properties": fields, "required": needed, "additionalProperties": False}

    def _section(self, name: str) -> dict[str, Any]:
        kind = self.schema.sections[name]
        notes, hints, fields = descriptions(kind), get_type_hints(kind), {}
        typed = {f"{name}.{key}": hints[key] for key in field_names(kind)}
        typed |= {full: hint for full, hint in self.schema.more.items() if full.startswith(f"{name}.")}
        for full, hint in typed.items():
            if full in self.schema.elsewhere:
                continue
            key = full.partition(".")[2]
            content = {"enum": CHOICES[full]} if full in CHOICES else shape(hint)
            fields[key] = self._share(full, content | ({"description": notes[key]} if key in notes else {}))
        mapping = {"type": "object", "properties": fields, "additionalProperties": False}
        needed, listed = [*self.schema.needed(kind), *self.schema.required_in(name)], self.schema.lists.get(name)
        if listed is not None:
            mapping["anyOf"] = [{"required": needed}, {"required": [listed]}]
        elif needed:
            mapping["required"] = needed
        one = self._share(name, mapping)
        if listed is not None:
            several = {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, one]}}
            return {"anyOf": [one, several]}
        is_needed = name in self.schema.needed(self.schema.kind)
        return {"anyOf": [one]} if is_needed else {"anyOf": [one, {"type": "null"}]}

    def _share(self, name: str, content: dict[str, Any]) -> dict[str, str]:
        """A reference to what is shared under this name, or under a numbered one if that is something else."""
        names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        key = next(key for key in names if self.shared.setdefault(key, content) == content)
        return {"$ref": f"#/definitions/{key}"}


def shape(hint: Any) -> dict[str, Any]:
    """A type as JSON schema, by the rules of `records.fits`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _any_of([option for option in inner if option is not str or not any(map(_is_enum, inner))])
    if origin is Literal:
        return {"enum": list(inner)}
    if _is_enum(hint):
        return {"enum": [member.value for member in hint]}
    if origin in (list, tuple, set):
        return {"type": "array", "items": shape(inner[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": shape(inner[1])}
    return {} if hint is Any else {"type": _WORDS.get(hint, "object")}


def _any_of(options: list[Any]) -> dict[str, Any]:
    made = [shape(option) for option in options]
    shapes = [entry for number, entry in enumerate(made) if entry not in made[:number]]
    words = [entry["type"] for entry in shapes if list(entry) == ["type"]]
    if len(words) == len(shapes):
        return {"type": words if len(words) > 1 else words[0]}
    return {"anyOf": shapes} if len(shapes) > 1 else shapes[0]


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def descriptions(kind: Any) -> dict[str, str]:
    """What a dataclass says of its fields: in their metadata, in its docstring's Args, or in comments."""
    notes: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if dataclasses.is_dataclass(cls):
            notes |= field_comments(cls) | dict(_documented(cls.__dict__.get("__doc__") or ""))
    notes |= {item.name: item.metadata["help"] for item in dataclasses.fields(kind) if item.metadata.get("help")}
    return {name: _short(note) for name, note in notes.items()}


def field_comments(cls: Any) -> dict[str, str]:
    """The comment behind each of a dataclass's own fields, or the one above it."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, comments = source.splitlines(), {}
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    notes = {}
    for number, line in enumerate(lines, 1):
        if not (found := re.match(r" {4}(\w+): ", line)):
            continue
        above = number - 1 if lines[number - 2].lstrip().startswith("#") else None
        if (note := comments.get(number) or comments.get(above or 0)) is not None:
            notes[found[1]] = note
    return notes


def _documented(doc: str) -> Iterator[tuple[str, str]]:
    """The entries of a docstring's Args."""
    _, _, args = inspect.cleandoc(doc).partition("\nArgs:\n")
    args = re.split(r"\n(?=\S)", args)[0]
    yield from re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", args, re.MULTILINE)


def _short(text: str) -> str:
    return textwrap.shorten(" ".join(text.split()), _LONGEST, placeholder=" ...")
