"""Which functions of a test file its tests run: tests that are not always skipped, and what they call or ask for."""

import ast
import re

_NEVER = re.compile(r"pytest\.(mark\.skip(\(.*\))?$|mark\.skipif\(True[,)]|mark\.xfail\(.*run=False|skip\()", re.S)


def live(tree: ast.Module) -> list[ast.FunctionDef]:
    """The tests of a file, its functions that these call, and its fixtures that these ask for, in the file's order."""
    if any(_skips(node) for node in tree.body):
        return []
    functions = [node for node in _functions(tree) if not _is_skipped(node)]
    reached = {node for node in functions if node.name.startswith("test")}
    while True:
        wanted = set().union(*map(_mentioned, reached))
        more = {node for node in functions if node.name in wanted and not node.name.startswith("test")} - reached
        if not more:
            return [node for node in functions if node in reached]
        reached |= more


def _functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """Functions of the file and methods of its classes of tests that are not skipped."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
    bodies = [tree.body, *(node.body for node in classes if not _is_skipped(node))]
    return [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]


def _is_skipped(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any(map(_never, node.decorator_list)) or any(map(_skips, node.body))


def _skips(statement: ast.stmt) -> bool:
    """`pytest.skip(...)`, or `pytestmark = pytest.mark.skip`, whatever the case."""
    return isinstance(statement, (ast.Expr, ast.Assign)) and _never(statement.value)


def _never(mark: ast.expr) -> bool:
    marks = mark.elts if isinstance(mark, (ast.List, ast.Tuple)) else [mark]
    return any(_NEVER.match(ast.unparse(one)) for one in marks)


def _mentioned(function: ast.FunctionDef) -> set[str]:
    """Names that a function uses, its parameters, and the fixtures that its marks name."""
    nodes = list(ast.walk(function))
    names = {node.id for node in nodes if isinstance(node, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    return names | {
        node.value
        for mark in function.decorator_list
        for node in ast.walk(mark)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
