"""A child module that stands in for a parameter of its parent: whoever reads the parameter gets what the child returns.

torch's parametrisations do the same, but one that is removed from a deep copy is gone from the original as well.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

PREFIX = "saved_parameter_"  # of the child's name; without "bone_": PEFT passes over that when it deletes an adapter


def put(module: nn.Module, key: str, child: nn.Module) -> nn.Parameter:
    """Let the child stand in for the parameter `key`, which is returned. The module's class becomes a subclass of the
    same name; copies and pickles of the module keep it."""
    parameter = module._parameters.pop(key)
    assert parameter is not None
    module.__class__ = _class_with(_own_class(module), (*keys(module), key))
    module.add_module(PREFIX + key, child)
    return parameter


def take_away(module: nn.Module, key: str, parameter: nn.Parameter, order: list[str]) -> None:
    """The inverse of `put`; `order`: of the module's parameters before anything stood in for one."""
    del module._modules[PREFIX + key]
    remaining = tuple(other for other in keys(module) if other != key)
    module.__class__ = _class_with(_own_class(module), remaining) if remaining else _own_class(module)
    parameters = {**module._parameters, key: parameter}
    ordered = [other for other in order if other in parameters]
    module._parameters.clear()
    module._parameters.update({other: parameters[other] for other in dict.fromkeys([*ordered, *parameters])})


def keys(module: nn.Module) -> tuple[str, ...]:
    """The parameters for which something stands in; none where somebody has changed the module's class since."""
    return type(module).__dict__.get("_flashbone_keys", ())


def _own_class(module: nn.Module) -> Any:
    return type(module).__dict__.get("_flashbone_class", type(module))


@functools.cache
def _class_with(own: Any, keys: tuple[str, ...]) -> Any:
    """The subclass for these parameters. It is made once and never changed, so that copies of modules may share it."""
    fields: dict[str, Any] = {key: _reading(PREFIX + key) for key in keys}
    fields |= {"_flashbone_class": own, "_flashbone_keys": keys, "__reduce__": _reduce}
    fields |= {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own)(own.__name__, (own,), fields)


def _reading(child: str) -> property:
    return property(lambda module: module._modules[child]())


def _reduce(module: Any) -> tuple:
    state = module.__getstate__() if hasattr(module, "__getstate__") else vars(module)  # Python 3.10 has no default
    return _empty, (_own_class(module), keys(module)), state


def _empty(own: Any, keys: tuple[str, ...]) -> nn.Module:
    cls = _class_with(own, keys)
    return cls.__new__(cls)
