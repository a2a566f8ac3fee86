"""The mutants of a module: mutmut's operators, without changes that only break types or the text of messages."""

import collections
import difflib
import itertools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, WhitespaceInclusivePositionProvider
from mutmut.mutation import mutators

# Docstrings, types, imports, decorators; errors and their text; and asserts, which are for our own bugs.
LEFT_OUT = (cst.Annotation, cst.Import, cst.ImportFrom, cst.Decorator, cst.Raise, cst.Assert)
# Of `a = None` for every `a = b` and of `f(None)` for every `f(a)`, nearly all fail at once.
UNUSED = (mutators.operator_assignment, mutators.operator_arg_removal, mutators.operator_string)


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        file: The file.
        function: Qualified name of the function that it is in; empty outside of functions.
        change: The changed lines, "before -> after"; with " [2]" where it is the second equal change of the function.
        source: The whole file with the change.
        lines: Numbers of the lines that it changes.
        function_lines: Those of the function; empty outside.
    """

    file: Path
    function: str
    change: str
    source: str
    lines: range
    function_lines: range

    @property
    def is_outside(self) -> bool:
        """Whether no function's code differs: then everything has to be imported anew."""
        return not self.function

    def codes(self) -> Iterator[types.CodeType]:
        """The code of every function."""
        return _nested(compile(self.source, self.file, "exec", dont_inherit=True))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield inner
            yield from _nested(inner)


def of_module(file: Path) -> list[Mutant]:
    """All mutants of a file, in its order."""
    source = file.read_text()
    wrapper = MetadataWrapper(cst.parse_module(source))
    finder = _Finder()
    wrapper.visit(finder)
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    found, seen = {source: None}, collections.Counter()
    for _, changed, where, path, function in finder.found:
        start, end = (starts[at.line - 1] + at.column for at in (where.start, where.end))
        code = source[:start] + wrapper.module.code_for_node(changed) + source[end:]
        if code in found:
            continue
        change = _change(source, code)
        seen[path, change] += 1
        if seen[path, change] > 1:
            change += f" [{seen[path, change]}]"
        found[code] = Mutant(file, path, change, code, range(where.start.line, where.end.line + 1), function)
    return [mutant for mutant in found.values() if mutant]


def unchanged(file: Path) -> Mutant:
    """No change, met by every test that runs any line of the file."""
    source = file.read_text()
    return Mutant(file, "", "no change", source, range(1, source.count("\n") + 2), range(0))


def _change(before: str, after: str) -> str:
    parts = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    old, new = (" ".join(part[2:].strip() for part in parts if part.startswith(sign)) for sign in "-+")
    return f"{old} -> {new}"


class _Finder(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (WhitespaceInclusivePositionProvider,)

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, CodeRange, str, range]] = []
        self.path: list[str] = []
        self.functions: list[range] = []

    def where(self, node: cst.CSTNode) -> CodeRange:
        return self.get_metadata(WhitespaceInclusivePositionProvider, node)

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, LEFT_OUT) or (isinstance(node, cst.Expr) and isinstance(node.value, cst.SimpleString)):
            return False
        if isinstance(node, cst.Arg) and node.keyword and node.keyword.value == "strict":  # of zip: as an assert
            return False
        if isinstance(node, cst.FunctionDef):
            node.params.visit(self)  # defaults are outside of the function
            self.path.append(node.name.value)
            body = self.where(node.body)
            self.functions.append(range(body.start.line, body.end.line + 1))
            node.body.visit(self)
            return False  # it is left all the same
        if isinstance(node, cst.ClassDef):
            self.path.append(node.name.value)
        inside = bool(self.functions)
        for old, new in mutations(node):
            path = ".".join(self.path) if inside else ""
            self.found.append((old, new, self.where(old), path, self.functions[-1] if inside else range(0)))
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self.path.pop()
        if isinstance(node, cst.FunctionDef):
            self.functions.pop()


def is_negative_number(node: cst.CSTNode) -> bool:
    """Such as an index, whose number is changed already."""
    return isinstance(node, cst.UnaryOperation) and isinstance(node.expression, cst.Integer)


def mutations(node: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, cst.CSTNode]]:
    """What the operators make of a node: what is replaced, and by what."""
    for kind, operator in mutators.mutation_operators:
        if isinstance(node, kind) and operator not in UNUSED and not is_negative_number(node):
            yield from ((node, changed) for changed in operator(node))
    if isinstance(node, cst.SimpleString) and " " not in node.value:  # with spaces: prose
        yield from ((node, changed) for changed in [*mutators.operator_string(node)][:1])
    if isinstance(node, cst.If):  # as mutmut does with `a if b else c`
        forced = mutators.operator_if_exp(cst.IfExp(node.test, cst.Name("a"), cst.Name("b")))
        yield from ((node.test, changed.test) for changed in forced)
    if isinstance(node, cst.Call):
        for i, argument in enumerate(node.args):
            if argument.keyword and argument.keyword.value == "strict":
                continue
            if argument.keyword or (i == len(node.args) - 1 > 0 and not argument.star):
                yield node, node.with_changes(args=[*node.args[:i], *node.args[i + 1 :]])
