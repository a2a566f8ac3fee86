"""Runs a page of the documentation as a reader would: its Python, its commands and its files, from top to bottom.

A block is code if its language says so: ```python, ```bash, ```yaml, ```json. Anything else (```text, indented lines)
is a synopsis, a formula or an output, and is not run. A ```yaml or ```json block whose first line is a comment with a
file's name (`# train.yaml`) is written to that file, so that the commands below can use it; a ```yaml block without one
is fields of a recipe. A file whose format has no comments is named by the fence: ```json title="rows.jsonl".
"""

import json
import os
import re
import shlex
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import yaml
from packaging.requirements import Requirement

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
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language = match[2].split()[0] if match[2].split() else ""
        title = re.search(r'title="([^"]+)"', match[2])
        content = (f"# {title[1]}\n" if title else "") + textwrap.dedent(match[3])
        found.append(Block(language, content, text.count("\n", 0, match.start()) + 1))
    return found


def commands(text: str) -> list[list[str]]:
    """The lines of a shell block as words: comments dropped, lines that end in a backslash joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@dataclass
class PageRun:
    """One page. `replaced` stands in for what takes too long or is not here; `elsewhere` checks the commands that
    cannot run here, by their first word: it gets the words, and asserts what it can. Each key of both must occur."""

    page: str
    replaced: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, Callable[[list[str]], object]] = field(default_factory=dict)
    names: dict = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)  # languages of the blocks that ran
    commands: list[str] = field(default_factory=list)  # first words of the commands that ran

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
        unused = self.elsewhere.keys() - self.commands
        assert not unused, f"{self.page}: no command is one of {sorted(unused)}"
        return self

    def python(self, block: Block) -> None:
        # Blank lines in front, so that a traceback names the page's own line.
        exec(compile("\n" * block.line + block.text, self.page, "exec"), self.names)

    def bash(self, block: Block) -> None:
        for words in commands(block.text):
            variables = {}
            while len(words) > 1 and (setting := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0], re.S)):
                variables[setting[1]], words = setting[2], words[1:]
            with mock.patch.dict(os.environ, variables):
                self.command(words, f"{self.page}:{block.line}: {shlex.join(words)}")
            self.commands.append(words[0])

    def command(self, words: list[str], where: str) -> None:
        if words[0] in self.elsewhere:
            self.elsewhere[words[0]](words)
        elif words[0] == "flashbone":
            from flashbone.cli import main

            assert main(words[1:]) == 0, where
        elif words[0] == "make":
            assert set(words[1:]) <= make_targets(), where
        elif words[:2] == ["pip", "install"]:
            assert [word for word in words[2:] if not _is_known(word)] == [], where
        else:
            raise AssertionError(f"{where}: nothing runs this; give it in `elsewhere`, or make the block ```text")

    def yaml(self, block: Block) -> None:
        value = self._mapping(block, yaml.safe_load(block.text))
        if named := _name_of(block):
            _write(named, block.text)
        else:
            assert_recipe_fields(value)

    def json(self, block: Block) -> None:
        named = _name_of(block)
        lines = block.text.split("\n", 1)[1] if named else block.text
        for value in lines.splitlines() if named and named.endswith(".jsonl") else [lines]:
            self._mapping(block, json.loads(value))
        if named:
            _write(named, lines)

    def _mapping(self, block: Block, value: object) -> dict:
        assert isinstance(value, dict), f"{self.page}:{block.line}: a mapping was wanted"
        return value


def assert_recipe_fields(fields: dict) -> None:
    """Fields of a recipe for `flashbone train`, on a page that leaves out the rest of it."""
    from flashbone.train.recipe import load_recipe

    with TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        data = {"path": "X"} | fields.get("data", {})
        file.write_text(json.dumps({"model": "M", "output": "o", **fields, "data": data}), encoding="utf-8")
        load_recipe(file)


def _name_of(block: Block) -> str | None:
    """The file that the block's first line names."""
    named = _NAMED.match(block.text.partition("\n")[0])
    return named[1] if named else None


def _write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")


def run_page(page: str, **options) -> PageRun:
    """Run all code of a page in the current folder; see PageRun for the options."""
    return PageRun(page, **options).run()


def make_targets() -> set[str]:
    """The targets of the Makefile; its variables, `NAME := value`, are none."""
    heads = re.findall(r"^([\w -]+):(?!:?:?=)", _text("Makefile"), re.M)
    return {name for head in heads for name in head.split()}


def known_extras() -> set[str]:
    """The extras that pyproject.toml declares."""
    section = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", _text("pyproject.toml"), re.S)
    assert section
    return set(re.findall(r"^(\w+) = \[", section[1], re.M))


def _is_known(word: str) -> bool:
    """Whether a word of `pip install` is an option, this package with extras that it has, or a package of
    constraints.txt."""
    if word.startswith("-"):
        return True
    requirement = Requirement(re.sub(r"^\.(?=\[|$)", "flashbone", word))
    if requirement.name == "flashbone":
        return requirement.extras <= known_extras()
    return re.search(rf"^{re.escape(requirement.name)}==", _text("constraints.txt"), re.M | re.I) is not None


def _text(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")
