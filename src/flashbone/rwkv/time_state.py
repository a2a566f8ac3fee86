"""State tuning: the state that every sequence starts from, learned in the place of zeros.

A model with `time_state` has a parameter (heads, N, N), value by key features, in each block's att, by RWKV-PEFT's
name. Files of it are RWKV-PEFT's: one `.pth` of `blocks.<i>.att.time_state`, which BlinkDL's chats load.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashbone.errors import ConfigError, FormatError
from flashbone.files import outputs
from flashbone.files.states import read_state, write_pickle
from flashbone.rwkv.layers import TimeMix, read

NAME = "time_state"


def add_time_state(model: nn.Module) -> None:
    """Give an RWKV model a `time_state`, of zeros, where it has none, and train that alone: it computes what it did.

    Raises:
        ConfigError: it is another model.
    """
    _time_mixes(model)
    add(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(f".{NAME}"))


def add(model: nn.Module) -> None:
    """Give a model's time mixings a state of zeros where they have none."""
    for _, half in _named(model):
        if not hasattr(half, NAME):
            half.add_time_state()


def drop(model: nn.Module) -> None:
    """Take a state of zeros, which changes nothing, from a model again; a learned one, or one in training, stays."""
    for _, half in _named(model):
        state = half._parameters.get(NAME)
        if state is not None and not state.requires_grad and not state.is_meta and not state.any():
            del half._parameters[NAME]
            half.config.has_time_state = False


def save_time_state(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a model's state, or the one that its active adapter has, to a new `.pth` file of RWKV-PEFT's form.

    Raises:
        ConfigError: the model has none, or is another model.
        FlashboneError: the path exists already.
    """
    halves, out = _time_mixes(model), Path(path)
    if missing := [name for name, half in halves.items() if not hasattr(half, NAME)]:
        raise ConfigError(f"save_time_state: {missing[0]} has no {NAME}; train one first, after add_time_state(model)")
    values = {f"{name}.{NAME}": read(getattr(half, NAME)).detach().cpu() for name, half in halves.items()}
    values = {name: value.to(dtype or value.dtype) for name, value in values.items()}
    outputs.check(out, sum(value.nbytes for value in values.values()), None, is_file=True)
    with outputs.whole_or_absent(out, is_file=True) as partial:
        write_pickle(values, partial)


def load_time_state(model: nn.Module, path: str | Path) -> None:
    """Give a model the state in a file of RWKV-PEFT.

    Raises:
        FormatError: the file is broken, or its states are not this model's; all misfits are named.
        ConfigError: it is another model.
    """
    halves, state = _time_mixes(model), read_state(Path(path))
    wanted = {f"{name}.{NAME}": half.state_shape for name, half in halves.items()}
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in wanted]
    shapes = {name: tuple(state[name].shape) for name in wanted if name in state}
    problems += [
        f"{name} has shape {got}, wanted {wanted[name]}" for name, got in shapes.items() if got != wanted[name]
    ]
    if problems:
        raise FormatError(f"{path}: as the state of this model: {'; '.join(problems)}")
    add(model)
    with torch.no_grad():
        for name, half in halves.items():
            place: Any = half._parameters.get(NAME)
            if place is None:
                raise ConfigError(f"{name}.{NAME}: an adapter has its place; load the state before adding the adapter")
            place.copy_(state[f"{name}.{NAME}"])


def _time_mixes(model: nn.Module) -> dict[str, TimeMix]:
    """Name in a file -> the time mixing of each block."""
    halves = dict(_named(model))
    if not halves:
        raise ConfigError(f"{NAME}: got a {type(model).__name__}, wanted an RWKV model of flashbone")
    return halves


def _named(model: nn.Module) -> Iterator[tuple[str, TimeMix]]:
    for name, module in model.named_modules():
        if isinstance(module, TimeMix):
            yield name.removeprefix("base_model.model."), module
