"""YAML as plain data: text, numbers, truth values, lists and mappings, of bounded size and depth."""

import re
from pathlib import Path
from typing import Any

import yaml

from flashbone.errors import ConfigError, FormatError

LARGEST, DEEPEST, MOST = 2**20, 32, 20_000  # bytes of a file; levels; values, each alias counted in full

_CORE = {  # what a word without quotes is, and the characters that it may begin with
    "bool": (r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)", "yYnNtTfFoO"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
_TAG = "tag:yaml.org,2002:"
_WORDS = [f"{_TAG}{name}" for name in ("null", "bool", "int", "float")]
_KEPT = ("null", "bool", "int", "float", "str", "seq", "map")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: there is no such file.
        FormatError: it is not a YAML mapping of plain data; the message gives the line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; a YAML file was wanted") from None
    if len(content) > LARGEST:
        raise FormatError(f"{path}: is larger than {LARGEST // 2**20} MiB; a configuration was wanted")
    try:
        mapping = parse_yaml(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not isinstance(mapping, dict):
        got = "nothing" if mapping is None else type(mapping).__name__
        raise FormatError(f"{path}: holds {got}; a mapping with model, data and output was wanted")
    return mapping


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        FormatError: it is not valid, or more than plain data; the message begins with `where` and gives the line.
    """
    try:
        return yaml.load(text, PlainLoader)  # a SafeLoader with fewer tags
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "malformed"
        raise FormatError(f"{where}{line}: not valid YAML: {' '.join(str(problem).split())[:200]}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:  # of an explicit tag: `!!int x`
        raise FormatError(f"{where}: not valid YAML: {' '.join(str(error).split())[:200]}") from None


def yaml_text(content: dict[str, Any]) -> str:
    """Plain data as YAML that `parse_yaml` reads back to the same."""
    return yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=110)


class PlainLoader(yaml.SafeLoader):
    """Reads the numbers of YAML 1.2, such as 2e-4, as numbers; dates, 007 and all keys stay text. Refuses other tags,
    repeated keys, and what exceeds the limits above."""

    yaml_implicit_resolvers: dict[Any, Any] = {}
    yaml_constructors: dict[Any, Any] = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _KEPT
    }

    def __init__(self, text: str):
        super().__init__(text)
        self._depth, self._values, self._sizes = 0, 0, {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        is_alias, before = self.check_event(yaml.AliasEvent), self._values
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.MarkedYAMLError(None, None, f"more than {DEEPEST} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(None, None, "an alias of what it is inside", mark)
        self._values += self._sizes[id(node)] if is_alias else 1
        if self._values > MOST:
            raise yaml.MarkedYAMLError(None, None, f"more than {MOST} values", mark)
        self._sizes.setdefault(id(node), self._values - before)
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        node.value.encode()  # a lone surrogate, which cannot be written
        if "\0" in node.value:
            raise yaml.MarkedYAMLError(None, None, "a NUL character", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key that is no word", key.start_mark)
            if key.tag in _WORDS:  # `no` and `1` are names here
                key.tag = f"{_TAG}str"
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value} comes twice", key.start_mark)
            seen.add(key.value)
        return node


for _name, (_pattern, _first) in _CORE.items():
    PlainLoader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


class _PlainDumper(yaml.SafeDumper):
    """Puts in quotes what PlainLoader would not read as text."""

    yaml_implicit_resolvers = PlainLoader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True
