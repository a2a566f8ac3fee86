"""The ledger of the documentation: which test runs which page, and what no test runs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.live_tests import live
from helpers.pages import CODE, FENCE, ROOT, Block, blocks, make_targets

TESTS = ("tests/docs", "tests/quantised")
OURS = {"accelerate", "bash", "curl", "flashbone", "git", "make", "pip", "python", "python3", "rm"}
BEFORE = {"sudo", "time", "uv"}  # words before a command
NAMES = {"RWKV"}  # written in capitals, and yet no placeholders


def pages(root: Path = ROOT) -> list[str]:
    """README.md, CHANGELOG.md, CONTRIBUTING.md, SECURITY.md and all Markdown below docs/, named from the root."""
    found = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
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
        found += _late_import(page, fences)
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
    for function in live(tree):
        for call in _run_in(function, runners):
            value = call.args[0].value if isinstance(call.args[0], ast.Constant) else None
            value = constants.get(call.args[0].id) if isinstance(call.args[0], ast.Name) else value
            if isinstance(value, str):
                yield value


def _run_in(function: ast.FunctionDef, runners: set[str]) -> Iterator[ast.Call]:
    """`run_page(page)`, `PageRun(page).run()`, and `name = PageRun(page)` where `name.run()` follows."""
    nodes = list(ast.walk(function))
    ran = [node.func.value for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".run")]
    names = {node.id for node in ran if isinstance(node, ast.Name)}
    ran += [n.value for n in nodes if isinstance(n, ast.Assign) and names & {ast.unparse(to) for to in n.targets}]
    for node in nodes:
        is_runner = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in runners
        if is_runner and node.args and (node.func.id == "run_page" or node in ran):
            yield node


def _late_import(page: str, fences: list[Block]) -> list[str]:
    """Python that takes BoneConfig before it imports flashbone: in the tests BONE is there all the same, for a reader
    it is not."""
    here = False
    for block in fences:
        nodes = ast.walk(ast.parse(block.text)) if block.language == "python" and not here else ()
        for node in sorted((n for n in nodes if hasattr(n, "lineno")), key=lambda n: (n.lineno, n.col_offset)):
            here = here or _imports_flashbone(node)
            if not here and "BoneConfig" in _names(node):
                return [f"{page}:{block.line}: BoneConfig is used before `import flashbone`"]
    return []


def _names(node: ast.AST) -> set[str]:
    """Names that are those of this very node, not of what is in it."""
    names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
    return names | {getattr(node, "id", ""), getattr(node, "attr", "")}


def _imports_flashbone(node: ast.AST) -> bool:
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return any(module.split(".")[0] == "flashbone" for module in modules)


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
    """Whether a line is a command of ours with arguments that could be given so, or among others; or begins Python."""
    if re.match(r"(import \w|from [\w.]+ import )", line):
        return True
    commands = re.split(r" (?:&&|\|\|?) |; ", line.partition(" #")[0].removeprefix("$ "))
    return any(_is_command(command.split()) for command in commands)


def _is_command(words: list[str]) -> bool:
    while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] in BEFORE):
        words = words[1:]
    if len(words) < 2 or (words[0] == "make" and words[1] not in make_targets()):
        return False
    return Path(words[0]).name in OURS and not any(_is_placeholder(word) for word in words[1:])


def _is_placeholder(word: str) -> bool:
    """`ADAPTER`, `CONFIG.yaml`, `--to FORMAT`, `[--json]`, `A|B`, `...`"""
    if word.startswith("[") or "|" in word or "..." in word:
        return True
    return any(part.isalpha() and part.isupper() and part not in NAMES for part in re.split(r"\W", word))
