"""Calls of a model: what belongs to one call and not to the model, and changes of the model that wait for calls.

Threads may call a model at the same time, each with an adapter for each row of its own. All that layers know of a call
is in `CURRENT`, which every thread has for itself.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch.distributed as dist
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from flashbone.errors import ConfigError
from flashbone.ops.cache import NOTHING, Kept
from flashbone.tuner.layers.mixed_batch import RowNames

P = ParamSpec("P")
R = TypeVar("R")


class _Current(threading.local):
    """The call that runs in this thread.

    A thread's own attributes rather than a ContextVar, which torch.compile cannot trace.

    Attributes:
        rows: The adapter of each row, where the call names them.
        kept: What layers keep until the call ends; None outside of calls.
        gate: Of the model that is called.
    """

    rows: RowNames | None = None
    kept: dict[tuple[nn.Module, str], Kept] | None = None
    gate: Gate | None = None


CURRENT = _Current()


@contextmanager
def one_call(gate: Gate) -> Iterator[None]:
    """Within the block this thread calls a model: its layers keep what they build until the block ends, and take their
    rows' adapters from `CURRENT.rows`, if it is set in the block."""
    current, before = CURRENT, (CURRENT.rows, CURRENT.kept, CURRENT.gate)
    with gate.call():
        current.rows, current.kept, current.gate = None, {}, gate
        try:
            yield
        finally:
            current.rows, current.kept, current.gate = before


def kept_by(layer: nn.Module, part: str = "") -> Kept:
    """What a layer, or its part of an adapter, keeps in this call: nothing outside of calls, or where torch.distributed
    runs, since FSDP2 would have a weight whole for longer than its unit runs."""
    all_kept = CURRENT.kept
    if all_kept is None:
        return NOTHING
    kept = all_kept.get((layer, part))
    if kept is None:
        # Weights are kept while one thread alone calls the model: else there would be a copy for each.
        gate, is_distributed = CURRENT.gate, dist.is_available() and dist.is_initialized()
        kept = NOTHING if is_distributed else Kept(not part and (not gate or gate.has_one_call))
        all_kept[layer, part] = kept
    return kept


class Gate:
    """Lets calls of a model run together, and a change of the model alone: each waits for the others to end.

    Calls and changes may be nested in one thread. Copies and pickles of a gate are new.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._calls: Counter[int] = Counter()  # thread -> how many calls of it run, one inside the other
        self._changes: Counter[int] = Counter()  # the same of changes, of one thread at most
        self._waiting = 0  # changes

    @property
    def has_one_call(self) -> bool:
        """Whether one thread at most calls the model."""
        return len(self._calls) < 2

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of the model; changes that other threads asked for go first."""
        me = get_ident()
        with self._turn:
            if me not in self._calls and me not in self._changes:
                self._turn.wait_for(lambda: not self._changes and not self._waiting)
            self._calls[me] += 1
        try:
            yield
        finally:
            self._leave(self._calls, me)

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """A change of the model.

        Raises:
            ConfigError: it is asked for inside a call, while other threads run calls, which it would wait for.
        """
        me = get_ident()
        with self._turn:
            if me in self._calls and not self._is_alone(me):
                raise ConfigError(
                    f"{what}: asked for inside a call of this model, while other threads call it, too; call it after"
                    " the call has ended"
                )
            self._waiting += 1
            try:
                self._turn.wait_for(lambda: self._is_alone(me))
            finally:
                self._waiting -= 1
                self._turn.notify_all()
            self._changes[me] += 1
        try:
            yield
        finally:
            if CURRENT.kept:  # a change inside a call of its own
                CURRENT.kept.clear()
            self._leave(self._changes, me)

    def _is_alone(self, me: int) -> bool:
        return not (self._calls.keys() | self._changes.keys()) - {me}

    def _leave(self, what: Counter[int], me: int) -> None:
        with self._turn:
            what[me] -= 1
            if not what[me]:
                del what[me]
            self._turn.notify_all()

    def __reduce__(self) -> tuple[type[Gate], tuple[()]]:
        return Gate, ()


class Turn:
    """A lock of one layer, which one thread may take again; copies and pickles are new."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


def pass_rows_to_saved_modules(model: nn.Module) -> None:
    """Let modules that are trained whole (`modules_to_save`) take each row's adapter in calls that name them."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and _name_rows not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_name_rows, with_kwargs=True)


def _name_rows(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    batch = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if CURRENT.rows is None or batch is None:
        return args, kwargs
    return args, kwargs | {"adapter_names": CURRENT.rows.for_rows(len(batch))}


def changes_model(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Let a method, of a class with a `gate`, wait for other threads' calls of the model, and calls wait for it."""

    @functools.wraps(method)
    def alone(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.gate.change(method.__name__):
            return method(self, *args, **kwargs)

    return alone


def check_not_checkpointed() -> None:
    """
    Raises:
        ConfigError: the call names an adapter for each row, and torch.utils.checkpoint would run this part of it again
            in backward, after the call.
    """
    frame: Any = sys._getframe()
    while frame is not None and (module := frame.f_globals.get("__name__")) != "peft.peft_model":
        if module == "torch.utils.checkpoint":
            raise ConfigError(
                "adapter_names: torch.utils.checkpoint inside the model would run these layers again in backward"
                " without the names; switch it off, or put the whole call of the model inside it"
            )
        frame = frame.f_back
