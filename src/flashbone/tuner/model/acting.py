"""The net: in a model's first steps it names adapters that do nothing, and then it is gone."""

from __future__ import annotations

import functools
import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashbone.errors import ConfigError
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.layer import BoneLinear, bone_layers
from flashbone.tuner.layers.parameters import ParamWrapper

log = logging.getLogger(__name__)

ZERO_PASSES = 10  # backward passes after which a gradient that was always exactly zero is named
MAX_NAMES = 6
_REMEDY = "put such layers into exclude_modules"
_NO_USE = {"to", "type_as", "detach", "clone", "copy_", "set_", "requires_grad_", "cpu", "cuda", "__set__"}
_NO_USE |= {"zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}

Block = tuple[str, str]  # the names of a layer and of its adapter


class InertAdapterWarning(UserWarning):
    """An adapter is trained and does nothing."""


class Net:
    """Watches a model's first training forward, the gradients after it, and the first evaluation.

    A weight that is used while its layer does not run bypasses the adapter, and so do blocks that get no gradient
    though their layer ran: both are an error. A layer that did not run at all is only noted: an expert without tokens,
    a dropped layer, a tower without images.

    Attributes:
        raises: Whether to raise a ConfigError rather than warn.
    """

    raises = False

    def __init__(self, *roots: nn.Module) -> None:
        self._roots = [weakref.ref(root) for root in roots]
        self._unseen = {True, False}  # training and evaluation
        self._watch: _Watch | None = None
        self._used: dict[bool, set[str]] = {}
        self._unjudged: dict[Block, nn.Parameter] = {}
        self._forwards = 0
        self._named: set[str] = set()
        self._passes: Counter[Block] = Counter()
        self._zero: dict[Block, Any] = {}  # blocks that had no gradient but zeros so far, and their hooks

    def __reduce__(self) -> tuple[type[Net], tuple]:
        return Net, ()  # a copy of a model is watched anew

    def before(self, model: nn.Module, args: tuple) -> None:
        """Hook before the forward of the whole model."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or self._watch is not None:
            return
        if model.training and torch.is_grad_enabled():
            self.judge(model)
        elif model.training:
            return
        self._end(model)
        if model.training not in self._unseen or not _can_watch(model):
            return
        if layers := {name: layer for name, layer in bone_layers(model) if _acts(layer)}:
            if model.training:
                self._await_gradients(layers)
            self._watch = _Watch(model, layers)
            self._watch.start()

    def after(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Hook after it, also after one that failed."""
        if self._watch is None or self._watch.model is not model:
            return
        watch, self._watch = self._watch, None
        watch.stop()
        self._unseen.discard(model.training)
        self._used[model.training] = watch.used
        if watch.bypassed:
            self._report(
                "the model computes with the weights of these layers without calling them, past their adapters",
                watch.bypassed,
            )
        if idle := sorted(watch.layers.keys() - watch.used - watch.bypassed):
            what = "training" if model.training else "evaluation"
            log.warning("the first %s did not call the adapted layers %s", what, _listed(idle))
        self._end(model)

    def judge(self, model: nn.Module, last: bool = False) -> None:
        """Name the blocks that the first backward, or the first ten, gave nothing; `last`: a backward has ended."""
        if self._unjudged and (last or self._passes):
            used = self._used.get(True, set())
            unfit = [block for block in self._unjudged if block[0] in used and not self._passes[block]]
            self._unjudged = {}
            if unfit:
                self._report("these layers were called, and no gradient reached their adapters", {n for n, _ in unfit})
        zero = [block for block in self._zero if self._passes[block] >= ZERO_PASSES]
        if zero and not self._unjudged:
            some_learn = any(block not in self._zero for block in self._passes)
            for block in zero:
                self._zero.pop(block).remove()
            if some_learn:
                why = f"the gradient of their adapters was exactly zero in {ZERO_PASSES} backward passes"
                self._report(why, {name for name, _ in zero} & self._used[True])
        self._forwards += 1
        if self._forwards > 2 * ZERO_PASSES:
            for block in list(self._zero):  # of layers that did not run in all this time
                self._zero.pop(block).remove()
        self._end(model)

    def _await_gradients(self, layers: dict[str, BoneLinear]) -> None:
        for name, layer in layers.items():
            for adapter in layer.active_here():
                block, key = layer.bone_block._parameters[adapter], (name, adapter)
                if block is not None and block.requires_grad and offloading.is_materialized(block):
                    self._unjudged[key] = block
                    self._zero[key] = block.register_post_accumulate_grad_hook(functools.partial(self._got, key))

    def _got(self, key: Block, block: Tensor) -> None:
        self._passes[key] += 1
        gradient = block.grad
        if (type(gradient) is not Tensor or gradient.is_meta or bool(gradient.any())) and key in self._zero:
            self._zero.pop(key).remove()

    def _report(self, what: str, layers: set[str]) -> None:
        names = layers - self._named
        self._named |= layers
        if not names:
            return
        message = f"{_listed(sorted(names))}: {what}, so that these adapters do nothing; {_REMEDY}"
        if self.raises:
            raise ConfigError(message)
        warnings.warn(message, InertAdapterWarning, stacklevel=3)

    def _end(self, model: nn.Module) -> None:
        if not self._unseen and not self._unjudged and not self._zero:
            for root in (model, *(root() for root in self._roots)):
                _detach(root)


class _Watch:
    """One forward: which layers run, which weights are read through the layers, and which past them."""

    def __init__(self, model: nn.Module, layers: dict[str, BoneLinear]) -> None:
        self.model, self.layers, self.used = model, layers, set[str]()
        owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        self._weights = {
            id(weight): (name, weight)  # held, so that no other tensor gets its id
            for name, layer in layers.items()
            if layer.weight_reader is None
            and not isinstance(layer, ParamWrapper)
            and not offloading.is_sharded_or_offloaded(layer.get_base_layer())
            and (weight := layer.get_base_layer()._parameters.get("weight")) is not None
            and owners[id(weight)] == 1
        }
        self._running: list[str] = []
        self._hooks: list[Any] = []
        self._mode = _Uses(self._weights, self._running)

    @property
    def bypassed(self) -> set[str]:
        return self._mode.uses

    def start(self) -> None:
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_pre_hook(functools.partial(self._enter, name)))
            self._hooks.append(layer.register_forward_hook(self._leave, always_call=True))
            layer.on_read = functools.partial(self.used.add, name)
        self._mode.__enter__()

    def stop(self) -> None:
        self._mode.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            del layer.on_read

    def _enter(self, name: str, layer: nn.Module, args: tuple) -> None:
        self._running.append(name)
        tensor = next((value for value in args if isinstance(value, Tensor)), None)
        if tensor is None or tensor.numel():  # an expert that is called without tokens did not run
            self.used.add(name)

    def _leave(self, layer: nn.Module, args: tuple, output: Any) -> None:
        self._running.pop()


class _Uses(TorchFunctionMode):
    """Collects the layers whose weight is computed with while they do not run."""

    def __init__(self, weights: Mapping[int, tuple[str, Tensor]], running: list[str]) -> None:
        super().__init__()
        self.uses: set[str] = set()
        self._weights, self._running = weights, running

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for value in _flat((*args, *kwargs.values())):
            name, weight = self._weights.get(id(value), ("", None))
            if weight is not None and name not in self._running and _computes(func, result):
                self.uses.add(name)
        return result


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _computes(func: Any, result: Any) -> bool:
    """Whether a function of torch computes with its arguments, rather than describes or moves them."""
    attribute = getattr(getattr(func, "__self__", None), "__name__", "") if func.__name__ == "__get__" else ""
    no_use = func.__name__ in _NO_USE or attribute in ("data", "grad")
    return not no_use and any(isinstance(value, Tensor) for value in _flat((result,)))


def _acts(layer: BoneLinear) -> bool:
    return not layer.disable_adapters and not layer.merged and bool(layer.active_here())


def _can_watch(model: nn.Module) -> bool:
    """Not in replicas of nn.DataParallel, and not around compiled modules, which would be compiled twice."""
    if "_is_replica" in model.__dict__:
        return False
    return not any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + rest


def watch(*roots: nn.Module) -> None:
    """Watch the next steps of a model, whichever of these modules is called."""
    net = Net(*roots)
    for root in roots:
        _detach(root)
        root.register_forward_pre_hook(net.before)
        root.register_forward_hook(net.after, always_call=True)


def nets(model: Any) -> dict[Net, nn.Module]:
    """The nets of a model, each with a module that it watches."""
    hooks = ((hook, module) for module in model.modules() for hook in module._forward_pre_hooks.values())
    owners = ((getattr(hook, "__self__", None), module) for hook, module in hooks)
    return {net: module for net, module in owners if isinstance(net, Net)}


def _detach(root: nn.Module | None) -> None:
    if root is None:
        return
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Net)]:
            del hooks[key]
            root._forward_hooks_always_called.pop(key, None)
