"""Which layers' weights a host reads: found in the source of its forward and of what that calls."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from flashbone.errors import ConfigError
from flashbone.tuner.layers.layer import BoneLinear
from flashbone.tuner.layers.read_weights import check_readable

# What hosts ask a weight for without computing with it, and where they only compare with it.
_DESCRIPTIONS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "stride", "layout", "requires_grad"}
_DESCRIPTIONS |= {"is_cuda", "is_meta", "is_floating_point", "element_size", "data_ptr", "new_zeros", "new_empty"}
_COMPARISONS = {"to", "type_as", "isinstance", "id", "hasattr", "getattr"}
_ANY = "*"  # one of a list, chosen by a variable

Path = tuple[str, ...]


class Uses(NamedTuple):
    """Paths of children, from the host on: those whose weight is read, and those that are called."""

    read: frozenset[Path] = frozenset()
    called: frozenset[Path] = frozenset()


def mark_read_weights(model: nn.Module) -> None:
    """Tell each adapted layer whose weight a module of the model computes with that it is read.

    Raises:
        ConfigError: an adapter of such a layer has a dropout, and the host never calls the layer.
    """
    for name, host in model.named_modules():
        uses = uses_of(type(host))
        for path in uses.read:
            for child, layer in _children(host, path):
                if isinstance(layer, BoneLinear):
                    if layer.weight_reader is None or not layer.is_only_read:
                        called = any(_is_inside(path, called) for called in uses.called)
                        layer.become_read(type(host).__name__, only=not called)
                    _check(f"{name}.{child}" if name else child, layer)


def _check(name: str, layer: BoneLinear) -> None:
    if layer.is_only_read:
        try:
            check_readable(layer, {adapter: getattr(d, "p", 0.0) for adapter, d in layer.bone_dropout.items()})
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None


def _children(module: nn.Module, path: Path, before: str = "") -> Iterator[tuple[str, nn.Module]]:
    if not path:
        yield before, module
        return
    while isinstance(module, BaseTunerLayer):
        module = cast(nn.Module, module.get_base_layer())
    for name, child in module.named_children():
        if path[0] in (name, _ANY):
            yield from _children(child, path[1:], f"{before}.{name}" if before else name)


def _is_inside(path: Path, called: Path) -> bool:
    """Whether the path is of what was called, or inside it."""
    return len(called) <= len(path) and all(a == b or _ANY in (a, b) for a, b in zip(path, called, strict=False))


@functools.cache
def uses_of(host: type[nn.Module]) -> Uses:
    """What the forward of a class, and the methods and functions that it calls, do with children."""
    functions = list(_reachable(host))
    if not any("weight" in code.co_names for function in functions for code in _codes(function.__code__)):
        return Uses()
    read, called = set(), set()
    for function in functions:
        visitor = _Reader()
        visitor.visit(_tree(function))
        read |= visitor.read
        called |= visitor.called
    return Uses(frozenset(read), frozenset(called))


def _reachable(host: type[nn.Module]) -> Iterator[FunctionType]:
    """The forward and every function that is named in it: methods of the class, functions of the same module."""
    waiting, seen = [getattr(host, "forward", None)], set()
    while waiting:
        function = _function(waiting.pop())
        if function is None or function in seen or function.__module__ == nn.Module.__module__:
            continue
        seen.add(function)
        yield function
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        waiting += [getattr(host, name, None) for name in names]
        helpers = [_function(function.__globals__.get(name)) for name in names]
        waiting += [helper for helper in helpers if helper is not None and helper.__module__ == function.__module__]
        if "super" in names or names & {cls.__name__ for cls in host.__mro__[1:]}:
            waiting += [
                vars(cls)[name] for cls in host.__mro__ for name in (*names, function.__name__) if name in vars(cls)
            ]


def _function(value: Any) -> FunctionType | None:
    value = value.fget if isinstance(value, property) else value
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _tree(function: FunctionType) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source: the net of `acting` sees what the host does
        return ast.Module([], [])


class _Reader(ast.NodeVisitor):
    """Collects `<module>.<path>.weight` and calls of `<module>.<path>`; follows names that were given to a child."""

    def __init__(self) -> None:
        self.read: set[Path] = set()
        self.called: set[Path] = set()
        self._names: dict[str, Path] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._names |= {argument.arg: () for argument in node.args.args}
        for statement in node.body:
            self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind(target, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign | ast.NamedExpr) -> None:
        if node.value is not None:
            self._bind(node.target, node.value)
        self.generic_visit(node)

    visit_NamedExpr = visit_AnnAssign

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        self._bind_each(node.target, node.iter)
        self.generic_visit(node)

    visit_comprehension = visit_For

    def _visit_generators(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        for part in node.generators:  # before what they are used in
            self.visit(part)
        self.visit(node.elt)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = _visit_generators

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for each, its in zip(target.elts, value.elts, strict=True):
                self._bind(each, its)
        elif isinstance(target, ast.Name) and (path := self._path(value)) is not None:
            self._names[target.id] = path

    def _bind_each(self, target: ast.expr, values: ast.expr) -> None:
        """Names of a loop: over a container, `zip` or `enumerate` of some, their `items()` or `values()`."""
        name, args = "", []
        if isinstance(values, ast.Call):
            name = values.func.attr if isinstance(values.func, ast.Attribute) else getattr(values.func, "id", "")
            args = values.args or ([values.func.value] if isinstance(values.func, ast.Attribute) else [])
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        if name in ("enumerate", "items", "named_children") and args:
            self._bind_each(targets[-1], args[0])
        elif name in ("values", "children", "reversed") and args:
            self._bind_each(target, args[0])
        elif name == "zip":
            for each, its in zip(targets, args, strict=False):
                self._bind_each(each, its)
        elif isinstance(values, (ast.Tuple, ast.List)):
            for value in values.elts:
                self._bind(target, value)
        elif isinstance(target, ast.Name) and (path := self._path(values)) is not None:
            self._names[target.id] = (*path, _ANY)

    def visit_Call(self, node: ast.Call) -> None:
        if (path := self._path(node.func)) is not None:
            self.called.add(path)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        path = self._path(node)
        if path and path[-1] == "weight":
            self.read.add(path[:-1])
        self.visit(node.func)
        if name not in _COMPARISONS:
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                if (path := self._path(argument)) and path[-1] != "weight":
                    self.called.add(path)  # perhaps there
                self.visit(argument)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        inner = node.value
        if node.attr in _DESCRIPTIONS:
            while isinstance(inner, ast.Attribute) and inner.attr == "data":
                inner = inner.value
            if isinstance(inner, ast.Attribute) and inner.attr == "weight":
                return
        if node.attr == "weight" and isinstance(node.ctx, ast.Load) and (path := self._path(inner)):
            self.read.add(path)
        self.visit(node.value)

    def _path(self, node: ast.AST) -> Path | None:
        if isinstance(node, ast.Name):
            return self._names.get(node.id)
        if isinstance(node, ast.Attribute):
            before = self._path(node.value)
            return None if before is None else (*before, node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
            before, name = self._path(node.args[0]), node.args[1]
            return (*before, str(name.value)) if before is not None and isinstance(name, ast.Constant) else None
        if isinstance(node, ast.IfExp):
            return self._path(node.body) or self._path(node.orelse)
        if isinstance(node, ast.Subscript):
            if isinstance(node.slice, (ast.Slice, ast.Tuple)):  # of a tensor
                return None
            before = self._path(node.value)
            index = node.slice.value if isinstance(node.slice, ast.Constant) else _ANY
            return None if before is None else (*before, str(index))
        return None
