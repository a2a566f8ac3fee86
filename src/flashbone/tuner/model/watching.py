"""One watched forward: which adapted layers run, which weights are read off them, and which are used past them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashbone.errors import ConfigError
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.layer import BoneLinear
from flashbone.tuner.layers.parameters import ParamWrapper

READER = "a module of the model"
_COPIES = {"to", "type_as", "detach", "clone", "cpu", "cuda", "float", "double", "half", "bfloat16", "contiguous"}
_NO_VALUE = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones"}
_NO_VALUE |= {"new_empty", "new_full", "new_tensor", "__set__", "__setitem__"}


class ForwardWatch:
    """One forward: which layers run, which weights are read through the layers, and which past them.

    A weight that a host read off its layer, and that nobody knew to be read, is shifted when it is computed with.

    Attributes:
        used: Names of the layers that ran, or whose shifted weight was read.
        repaired: Names of those that were read unforeseen.
        bypassed: Names of those whose plain weight was computed with.
        answered: Names of those to whose output, or read weight, backward brings a gradient, or whose output has no
            way back to the block at all.
    """

    def __init__(self, model: nn.Module, layers: dict[str, BoneLinear]) -> None:
        self.model, self.layers = model, layers
        self.used, self.repaired, self.bypassed, self.answered = set[str](), set[str](), set[str](), set[str]()
        owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        self.weights: dict[int, tuple[str, Tensor]] = {
            id(weight): (name, weight)  # held, so that no other tensor gets its id
            for name, layer in layers.items()
            if not isinstance(layer, ParamWrapper)
            and not offloading.is_sharded_or_offloaded(layer.get_base_layer())
            and (weight := layer.get_base_layer()._parameters.get("weight")) is not None
            and owners[id(weight)] == 1
        }
        self.running: list[str] = []
        self.thread = get_ident()  # others may call the model at the same time
        self._forwards: dict[str, Any] = {}  # of instances that have one of their own
        self._read_plain: dict[str, Tensor | None] = {}  # and the shifted weight, once it is needed
        self._mode = _Uses(self)

    def start(self) -> None:
        for name, layer in self.layers.items():
            layer.on_read = functools.partial(self._read, name)
            self._forwards[name] = vars(layer).get("forward")
            layer.forward = functools.partial(self._run, name, layer.forward)  # hooks do not see `layer.forward(x)`
        self._mode.__enter__()

    def stop(self) -> None:
        self._mode.__exit__(None, None, None)
        for name, layer in self.layers.items():
            del layer.on_read, layer.forward
            if (forward := self._forwards[name]) is not None:
                layer.forward = forward
        for name in self.repaired:
            self.layers[name].become_read(READER, only=name not in self.used)

    def shifted(self, name: str, is_copy: bool) -> Tensor | None:
        """The weight with the adapters for a host that read it off this layer; None if it did not."""
        layer = self.layers[name]
        if name not in self._read_plain or layer.weight_reader is not None:
            return None
        if (weight := self._read_plain[name]) is None:
            layer.become_read(READER, only=False)
            try:
                weight = self._read_plain[name] = layer.weight
            except ConfigError as error:
                if is_copy:  # which need not be computed with
                    return None
                raise ConfigError(f"{name}: {error}") from None
            finally:
                layer.weight_reader = None
        self.repaired.add(name)
        return weight

    def _read(self, name: str, build: Callable[[], Any], is_shifted: bool) -> Any:
        if get_ident() != self.thread:
            return build()
        if not is_shifted:
            self._read_plain[name] = None
            return build()
        if self.layers[name].weight_reader != READER or name not in self._read_plain:
            self.used.add(name)
        return self._running(name, build)

    def _run(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if get_ident() != self.thread:
            return forward(*args, **kwargs)
        tensor = next((value for value in args if isinstance(value, Tensor)), None)
        if tensor is None or tensor.numel():  # an expert that is called without tokens did not run
            self.used.add(name)
        return self._running(name, functools.partial(forward, *args, **kwargs))

    def _running(self, name: str, run: Callable[[], Any]) -> Any:
        self.running.append(name)
        try:
            output = run()
        finally:
            self.running.pop()
        tensor = next((value for value in _flat((output,)) if isinstance(value, Tensor)), None)
        if tensor is None or not torch.is_grad_enabled():  # the first forward of a reentrant checkpoint
            return output
        if tensor.requires_grad:
            tensor.register_hook(functools.partial(_note, self.answered, name))
        else:
            self.answered.add(name)
        return output


def _note(names: set[str], name: str, gradient: Tensor | None) -> None:
    if gradient is not None:
        names.add(name)


class _Uses(TorchFunctionMode):
    """Sees when the weight of a layer is computed with while the layer does not run."""

    def __init__(self, watch: ForwardWatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, watch = kwargs or {}, self._watch
        values = args[:1] if func.__name__ in ("to", "type_as") else _flat((*args, *kwargs.values()))
        read = {i: watch.weights[i][0] for value in values if (i := id(value)) in watch.weights}
        read = {i: name for i, name in read.items() if name not in watch.running}
        if not read or not _gives_a_tensor(func, args, kwargs):
            return func(*args, **kwargs)
        is_copy = func.__name__ in _COPIES or _attribute(func) == "data"
        shifted = {i: weight for i, name in read.items() if (weight := watch.shifted(name, is_copy)) is not None}
        result = func(*_replaced(args, shifted), **dict(zip(kwargs, _replaced(kwargs.values(), shifted), strict=True)))
        for name in (name for i, name in read.items() if i not in shifted):
            if is_copy:
                watch.weights[id(result)] = name, result
            else:
                watch.bypassed.add(name)
        return result


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _replaced(values: Iterable[Any], by_id: dict[int, Tensor]) -> tuple:
    return tuple(
        type(value)(_replaced(value, by_id)) if type(value) in (list, tuple) else by_id.get(id(value), value)
        for value in values
    )


def _gives_a_tensor(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a function of torch makes a tensor of its arguments, rather than describes or overwrites one."""
    name = func.__name__
    if name in _NO_VALUE or _attribute(func) == "grad" or (name.endswith("_") and not name.startswith("_")):
        return False
    with torch.no_grad():  # nothing is kept for backward
        return any(isinstance(value, Tensor) for value in _flat((func(*args, **kwargs),)))


def _attribute(func: Any) -> str:
    return getattr(getattr(func, "__self__", None), "__name__", "") if func.__name__ == "__get__" else ""
