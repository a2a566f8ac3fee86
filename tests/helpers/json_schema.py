"""A validator of the part of JSON schema that `flashbone schema` writes."""

from collections.abc import Iterator
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def problems(value: Any, schema: dict[str, Any], whole: dict[str, Any], where: str = "") -> Iterator[str]:
    """What a value breaks, each with its place.

    Args:
        value: Plain data.
        schema: What it is held against.
        whole: The schema that has the definitions.
        where: The value's place.
    """
    for keyword, wanted in schema.items():
        match keyword:
            case "$ref":
                yield from problems(value, whole["definitions"][wanted.removeprefix("#/definitions/")], whole, where)
            case "type":
                if not any(is_of(value, kind) for kind in ([wanted] if isinstance(wanted, str) else wanted)):
                    yield f"{where}: {value!r} is no {wanted}"
            case "enum" | "const":
                if value not in (wanted if keyword == "enum" else [wanted]):
                    yield f"{where}: {value!r} is not {wanted}"
            case "anyOf":
                if all(any(problems(value, option, whole, where)) for option in wanted):
                    yield f"{where}: {value!r} fits nothing"
            case "allOf":
                for part in wanted:
                    yield from problems(value, part, whole, where)
            case "if":
                if not any(problems(value, wanted, whole, where)):
                    yield from problems(value, schema["then"], whole, where)
            case "required" if isinstance(value, dict):
                yield from (f"{where}: lacks {name}" for name in wanted if name not in value)
            case "properties" if isinstance(value, dict):
                for name in wanted.keys() & value.keys():
                    yield from problems(value[name], wanted[name], whole, f"{where}.{name}")
            case "additionalProperties" if isinstance(value, dict):
                for name in value.keys() - schema.get("properties", {}).keys():
                    yield from (
                        [f"{where}: has {name}"]
                        if not wanted and wanted is False
                        else problems(value[name], wanted, whole, f"{where}.{name}")
                    )
            case "items" if isinstance(value, list):
                for number, item in enumerate(value):
                    yield from problems(item, wanted, whole, f"{where}[{number}]")
            case "minItems" if isinstance(value, list):
                yield from [f"{where}: too short"] if len(value) < wanted else []
            case (
                "$schema"
                | "title"
                | "description"
                | "definitions"
                | "then"
                | "required"
                | "properties"
                | "additionalProperties"
                | "items"
                | "minItems"
            ):
                pass
            case _:
                raise AssertionError(f"the validator does not know {keyword}")


def is_of(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        return isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    return isinstance(value, TYPES[kind])
