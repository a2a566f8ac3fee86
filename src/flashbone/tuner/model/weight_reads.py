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
                        layer.weight_reader = type(host).__name__
                        layer.is_only_read = not any(_is_inside(path, called) for called in uses.called)
                    _check(f"{name}.{child}" if name else child, layer)


def _check(name: str, layer: BoneLinear) -> None:
    if layer.is_only_read:
        layer.converts_to_lora = False  # a LoRA is not read
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
    waiting, seen = ["forward"], set()
    while waiting:
        name = waiting.pop()
        function = _function(getattr(host, name, None))
        if function is None or function in seen or function.__module__ == nn.Module.__module__:
            continue
        seen.add(function)
        yield function
        for code in _codes(function.__code__):
            waiting += code.co_names
            for helper in (function.__globals__.get(n) for n in code.co_names):
                helper = _function(helper)
                if helper is not None and helper.__module__ == function.__module__ and helper not in seen:
                    seen.add(helper)
                    yield helper


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
        self._bind(node.targets[0], self._path(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        path = self._path(node.iter)
        self._bind(node.target, None if path is None else (*path, _ANY))
        self.generic_visit(node)

    def _visit_comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        for part in node.generators:
            path = self._path(part.iter)
            self._bind(part.target, None if path is None else (*path, _ANY))
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = _visit_comprehension

    def _bind(self, target: ast.expr, path: Path | None) -> None:
        if isinstance(target, ast.Name) and path is not None:
            self._names[target.id] = path

    def visit_Call(self, node: ast.Call) -> None:
        if (path := self._path(node.func)) is not None:
            self.called.add(path)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        self.visit(node.func)
        if name not in _COMPARISONS:
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
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
        if isinstance(node, ast.Subscript):
            before = self._path(node.value)
            index = node.slice.value if isinstance(node.slice, ast.Constant) else _ANY
            return None if before is None else (*before, str(index))
        return None
