"""The net: in a model's first steps it names adapters that do nothing, mends what it can, and then it is gone."""

from __future__ import annotations

import functools
import logging
import warnings
import weakref
from collections import Counter
from threading import Lock, get_ident
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from flashbone.errors import ConfigError
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.layer import BoneLinear, bone_layers
from flashbone.tuner.model.watching import ForwardWatch

log = logging.getLogger(__name__)

ZERO_PASSES = 10  # backward passes after which a gradient that was always exactly zero is named
MAX_NAMES = 6
_REMEDY = "put such layers into exclude_modules"
Block = tuple[str, str]  # the names of a layer and of its adapter


class InertAdapterWarning(UserWarning):
    """An adapter is trained and does nothing."""


class Net:
    """Watches a model's first training forward, the gradients after it, and the first evaluation.

    A weight that a host reads off a layer, which the scan of `weight_reads` did not see, is shifted from this read on,
    and the next forward is watched, too. An adapter is inert, which is an error, where its layer's weight is used in
    another way while the layer does not run, and where the layer's output gets a gradient but the block does not. An
    output without a gradient, such as that of a pooler that no head reads, is a warning. A layer that did not run at
    all is only noted: an expert without tokens, a dropped layer, a tower without images.

    Attributes:
        raises: Whether to raise a ConfigError for an inert adapter rather than warn.
    """

    raises = False

    def __init__(self, *roots: nn.Module) -> None:
        self._roots = [weakref.ref(root) for root in roots]
        self._unseen = {True, False, None}  # training, evaluation, and training without gradients, as checkpoints do
        self._watch: ForwardWatch | None = None
        self._turn = Lock()  # threads may call a model at the same time
        self._phase: bool | None = None  # of the forward that is watched
        self._used: dict[bool | None, set[str]] = {}
        self._answered: set[str] = set()  # layers of the watched training forward whose output got a gradient
        self._unjudged: dict[Block, nn.Parameter] = {}
        self._forwards = 0
        self._named: set[str] = set()
        self._passes: Counter[Block] = Counter()
        self._passes_before = 0  # when blocks began to wait for gradients
        self._zero: dict[Block, Any] = {}  # blocks that had no gradient but zeros so far, and their hooks

    def __reduce__(self) -> tuple[type[Net], tuple]:
        return Net, ()  # a copy of a model is watched anew

    def before(self, model: nn.Module, args: tuple) -> None:
        """Hook before the forward of the whole model."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return
        with self._turn:
            if self._watch is None:
                self._begin(model)

    def _begin(self, model: nn.Module) -> None:
        learns = model.training and torch.is_grad_enabled()
        if learns:
            self.judge(model)
        self._end(model)
        phase = model.training if learns or not model.training else None
        if phase not in self._unseen or not _can_watch(model):
            return
        host = model.model if isinstance(model, BaseTuner) else model
        if layers := {name: layer for name, layer in bone_layers(host) if _acts(layer)}:
            if learns:
                self._await_gradients(layers)
            self._watch, self._phase = ForwardWatch(model, layers), phase
            self._watch.start()

    def after(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Hook after it, also after one that failed."""
        watch = self._watch
        if watch is None or watch.model is not model or watch.thread != get_ident():
            return
        with self._turn:  # no other thread begins to watch layers from which this watch is not gone
            self._watch = None
            watch.stop()
            self._learn_from(watch)
            self._end(model)

    def _learn_from(self, watch: ForwardWatch) -> None:
        if not watch.repaired:
            self._unseen.discard(self._phase)
        self._used[self._phase] = watch.used - watch.repaired
        if self._phase:
            self._answered = watch.answered
        if watch.bypassed:
            what = "the model computes with the weights of these layers without calling them, past their adapters"
            self._report(what, watch.bypassed, is_inert=True)
        idle = sorted(watch.layers.keys() - watch.used - watch.repaired - watch.bypassed)
        if idle and self._phase is not None:
            what = "training" if self._phase else "evaluation"
            log.warning("the first %s did not call the adapted layers %s", what, _listed(idle))

    def judge(self, model: nn.Module, last: bool = False) -> None:
        """Name the blocks that the first backward, or the first ten, gave nothing; `last`: a backward has ended."""
        if self._unjudged and (last or self._passes.total() > self._passes_before):
            used = self._used.get(True, set())
            unfit = {block[0] for block in self._unjudged if block[0] in used and not self._passes[block]}
            self._unjudged = {}
            self._report("these layers ran, and no gradient came back to what they returned", unfit - self._answered)
            what = "a gradient came back to these layers, and none reached their adapters"
            self._report(what, unfit & self._answered, is_inert=True)
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
        self._passes_before = self._passes.total()
        for name, layer in layers.items():
            for adapter in layer.active_here():
                block, key = layer.bone_block._parameters[adapter], (name, adapter)
                if block is None or not block.requires_grad or not offloading.is_materialized(block):
                    continue
                if not self._passes[key]:
                    self._unjudged[key] = block
                if key not in self._zero:
                    self._zero[key] = block.register_post_accumulate_grad_hook(functools.partial(self._got, key))

    def _got(self, key: Block, block: Tensor) -> None:
        self._passes[key] += 1
        gradient = block.grad
        if (type(gradient) is not Tensor or gradient.is_meta or bool(gradient.any())) and key in self._zero:
            self._zero.pop(key).remove()

    def _report(self, what: str, layers: set[str], is_inert: bool = False) -> None:
        names = layers - self._named
        self._named |= layers
        if not names:
            return
        effect = "do nothing" if is_inert else "learn nothing"
        message = f"{_listed(sorted(names))}: {what}, so that these adapters {effect}; {_REMEDY}"
        if self.raises and is_inert:
            raise ConfigError(message)
        warnings.warn(message, InertAdapterWarning, stacklevel=3)

    def _end(self, model: nn.Module) -> None:
        if not self._unseen - {None} and not self._unjudged and not self._zero:
            for root in (model, *(root() for root in self._roots)):
                _detach(root)


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
        root.register_forward_pre_hook(net.before, prepend=True)
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
