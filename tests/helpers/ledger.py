"""The ledger of the documentation: which test runs which page, and what no test runs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.pages import CODE, FENCE, ROOT, blocks, make_targets

TESTS = ("tests/docs", "tests/quantised")
OURS = {"accelerate", "flashbone", "make", "pip", "python"}
NAMES = {"RWKV"}  # written in capitals, and yet no placeholders


def pages(root: Path = ROOT) -> list[str]:
    """README.md, CONTRIBUTING.md, SECURITY.md and all Markdown below docs/, named from the root."""
    found = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]
    return [*found, *sorted(str(file.relative_to(root)) for file in (root / "docs").rglob("*.md"))]


def runs(root: Path = ROOT) -> dict[str, list[str]]:
    """For each page the test files that run it, a file once for each `run_page(page)` or `SomePageRun(page)` in it."""
    found: dict[str, list[str]] = {}
    for file in sorted(file for folder in TESTS for file in (root / folder).glob("test_*.py")):
        for page in _pages_run_by(ast.parse(file.read_text(encoding="utf-8"))):
            found.setdefault(page, []).append(str(file.relative_to(root)))
    return found


def complaints(root: Path = ROOT) -> list[str]:
    """One line for each page whose code is not run by exactly one test, and for each block that should be code."""
    ran, found = runs(root), []
    for page in pages(root):
        fences = blocks(str(root / page))
        tests = ran.get(page, [])
        if any(block.language in CODE for block in fences) and len(tests) != 1:
            found.append(f"{page}: has code, and is run by {len(tests)} tests: {', '.join(tests) or 'none'}")
        for block in fences:
            if block.language not in (*CODE, "text"):
                found.append(f"{page}:{block.line}: no such language here: {block.language or 'none'}")
            if block.language == "text":
                found += _unrun(f"{page}:{block.line}", block.text.splitlines())
        prose = _without_fences((root / page).read_text(encoding="utf-8"))
        for line, indented in _indented(prose):
            found += _unrun(f"{page}:{line}", indented)
        strays = [n for n, line in enumerate(prose, 1) if re.match(r"[\s>]*(```|~~~)", line)]
        found += [
            f"{page}:{line}: a fence that is not read as one: is it closed, and of three backticks?" for line in strays
        ]
    return found


def _pages_run_by(tree: ast.Module) -> Iterator[str]:
    runners, constants = {"run_page", "PageRun"}, {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and runners & {base.id for base in node.bases if isinstance(base, ast.Name)}:
            runners.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            constants |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in runners and node.args:
            (page, *_) = node.args
            value = page.value if isinstance(page, ast.Constant) else constants.get(getattr(page, "id", ""))
            if isinstance(value, str):
                yield value


def _without_fences(text: str) -> list[str]:
    """The lines of a page, those of its fences empty."""
    return FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text).splitlines()


def _indented(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Indented blocks: the number of the first line, the lines without indentation."""
    start = None
    for number, line in enumerate([*lines, ""], 1):
        if start is None and line.startswith("    ") and (number == 1 or not lines[number - 2].strip()):
            start = number
        elif start is not None and not line.startswith("    "):
            yield start, [inner.strip() for inner in lines[start - 1 : number - 1]]
            start = None


def _unrun(where: str, lines: list[str]) -> list[str]:
    return [f"{where}: nothing runs this: {line}" for line in lines if is_runnable(line)]


def is_runnable(line: str) -> bool:
    """Whether a line is a command of ours with arguments that could be given so, or begins Python."""
    if re.match(r"(import \w|from [\w.]+ import )", line):
        return True
    words = line.partition(" #")[0].removeprefix("$ ").split()
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if len(words) < 2 or Path(words[0]).name not in OURS or (words[0] == "make" and words[1] not in make_targets()):
        return False
    return not any(_is_placeholder(word) for word in words[1:])


def _is_placeholder(word: str) -> bool:
    """`ADAPTER`, `CONFIG.yaml`, `--to FORMAT`, `[--json]`, `A|B`, `...`"""
    if word.startswith("[") or "|" in word or "..." in word:
        return True
    return any(part.isalpha() and part.isupper() and part not in NAMES for part in re.split(r"\W", word))
