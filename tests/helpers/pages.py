"""Runs a page of the documentation as a reader would: its Python, its commands and its files, from top to bottom.

A block is code if its language says so: ```python, ```bash, ```yaml, ```json. Anything else (```text, indented lines)
is a synopsis, a formula or an output, and is not run. A ```yaml or ```json block whose first line is a comment with a
file's name (`# train.yaml`) is written to that file, so that the commands below can use it.
"""

import json
import re
import shlex
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CODE = ("python", "bash", "yaml", "json")
FENCE = re.compile(r"^([ \t]*)```([^\n`]*)\n(.*?)^\1```[ \t]*$", re.M | re.S)
_NAMED = re.compile(r"#\s*([\w./-]+\.(?:yaml|yml|jsonl?))\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" if none is given), its text without indentation, the line where it starts."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, named from the root of the repository, in their order."""
    text = (ROOT / page).read_text()
    found = []
    for match in FENCE.finditer(text):
        language = match[2].split()[0] if match[2].split() else ""
        found.append(Block(language, textwrap.dedent(match[3]), text.count("\n", 0, match.start()) + 1))
    return found


def commands(text: str) -> list[list[str]]:
    """The lines of a shell block as words: comments dropped, lines that end in a backslash joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@dataclass
class PageRun:
    """One page. `replaced` stands in for what takes too long or is not here (each key must occur); `elsewhere` checks
    the commands that cannot run here, by their first word: it gets the words, and asserts what it can."""

    page: str
    replaced: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, Callable[[list[str]], object]] = field(default_factory=dict)
    names: dict = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)  # languages of the blocks that ran

    def run(self) -> "PageRun":
        """Run every block of code in the current folder; fails at the first that does."""
        code = [block for block in blocks(self.page) if block.language in CODE]
        everything = "".join(block.text for block in code)
        assert code, f"{self.page} has no code"
        assert [old for old in self.replaced if old not in everything] == [], f"{self.page}: nothing to replace"
        for block in code:
            text = block.text
            for old, new in self.replaced.items():
                text = text.replace(old, new)
            getattr(self, block.language)(Block(block.language, text, block.line))
            self.ran.append(block.language)
        return self

    def python(self, block: Block) -> None:
        # Blank lines in front, so that a traceback names the page's own line.
        exec(compile("\n" * block.line + block.text, self.page, "exec"), self.names)

    def bash(self, block: Block) -> None:
        for words in commands(block.text):
            while "=" in words[0] and len(words) > 1:  # VARIABLE=value before a command
                words = words[1:]
            self.command(words, f"{self.page}:{block.line}: {shlex.join(words)}")

    def command(self, words: list[str], where: str) -> None:
        if words[0] in self.elsewhere:
            self.elsewhere[words[0]](words)
        elif words[0] == "flashbone":
            from flashbone.cli import main

            assert main(words[1:]) == 0, where
        elif words[0] == "make":
            assert set(words[1:]) <= make_targets(), where
        elif words[:2] == ["pip", "install"]:
            assert [extra for word in words[2:] for extra in _extras(word) if extra not in known_extras()] == [], where
        else:
            raise AssertionError(f"{where}: nothing runs this; give it in `elsewhere`, or make the block ```text")

    def yaml(self, block: Block) -> None:
        self._mapping(block, yaml.safe_load(block.text))

    def json(self, block: Block) -> None:
        named = _NAMED.match(block.text.splitlines()[0])
        lines = block.text.split("\n", 1)[1] if named else block.text
        if named and named[1].endswith(".jsonl"):
            assert all(isinstance(json.loads(line), dict) for line in lines.splitlines())
            _write(named[1], lines)
        else:
            self._mapping(Block("json", lines, block.line), json.loads(lines), named[1] if named else None)

    def _mapping(self, block: Block, value: object, name: str | None = None) -> None:
        assert isinstance(value, dict), f"{self.page}:{block.line}: a mapping was wanted"
        if name is None and (named := _NAMED.match(block.text.splitlines()[0])):
            name = named[1]
        if name is not None:
            _write(name, block.text)


def _write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


def run_page(page: str, **options) -> PageRun:
    """Run all code of a page in the current folder; see PageRun for the options."""
    return PageRun(page, **options).run()


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    heads = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.M)
    return {name for head in heads for name in head.split()}


def known_extras() -> set[str]:
    """The extras that pyproject.toml declares."""
    section = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)
    assert section
    return set(re.findall(r"^(\w+) = \[", section[1], re.M))


def _extras(requirement: str) -> list[str]:
    """The extras of a requirement for this package: `.[train]`, `flashbone[train,eval]`."""
    found = re.fullmatch(r"(?:\.|flashbone)\[([\w,]+)\]", requirement)
    return found[1].split(",") if found else []
