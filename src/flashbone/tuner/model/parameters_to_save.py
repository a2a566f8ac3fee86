"""Which parameters `parameters_to_save` names, why some cannot be kept, and putting them into a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from flashbone.errors import ConfigError
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.kinds import with_article
from flashbone.tuner.layers.layer import BoneLayer
from flashbone.tuner.layers.parameters import ParamWrapper
from flashbone.tuner.model.saved_parameters import SavedParameter, bare, find
from flashbone.tuner.model.targets import MAX_SUGGESTIONS, TargetError

_FIELD = "parameters_to_save"


@dataclass(frozen=True)
class Place:
    """A parameter of a model: its name in the bare model, its module and its name in that."""

    name: str
    owner: nn.Module
    key: str
    reason: str | None  # why no adapter can keep it


def choose(model: nn.Module, config: Any, configs: Iterable[Any]) -> list[Place]:
    """The parameters that a config names, in the model's order. What adapters keep already is put aside.

    Args:
        model: The bare model.
        config: Of the new adapter.
        configs: Those of all adapters.

    Raises:
        TargetError: a name matches nothing, or a parameter that cannot be kept; all of them are named.
    """
    if not config.parameters_to_save:
        return []
    places = list(_places(model))
    trains_biases = any(other.bias == "all" for other in configs)
    chosen: dict[str, Place] = {}
    problems = []
    for entry in sorted(config.parameters_to_save):
        matches = [place for place in places if f".{place.name}".endswith(f".{entry}")]
        chosen |= {place.name: place for place in matches}
        if not matches:
            problems.append(f"{_FIELD}: the model has no parameter {entry!r}; it has {_near(places, entry)}")
    unfit: dict[str, list[str]] = {}
    for place in chosen.values():
        reason = place.reason or _saved_whole(place.name, config)
        if reason is None and place.key == "bias" and trains_biases:
            reason = "it is trained by bias='all' already; leave one out"
        if reason:
            unfit.setdefault(reason, []).append(place.name)
    for reason, names in unfit.items():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        problems.append(f"{_FIELD}: {names[0]}{more}: {reason}")
    if problems:
        raise TargetError("; ".join(problems))
    return [place for place in places if place.name in chosen]


def check_standing(standing: Iterable[SavedParameter], config: Any) -> None:
    """Whether a new adapter leaves alone what others keep; its layers are checked one by one as they are made.

    Raises:
        ConfigError: it trains such a parameter in another way.
    """
    for saved in standing:
        if reason := _saved_whole(saved.name, config):
            raise ConfigError(f"{saved.name} is kept by an adapter ({_FIELD}) of the model; in the new one {reason}")
        if config.bias == "all" and saved.key == "bias":
            raise ConfigError(f"{saved.name} is kept by an adapter ({_FIELD}), and bias='all' would train it as well")


def check_target(taken: Iterable[tuple[nn.Module, str, str]], layer: str, base: nn.Module, key: str | None) -> None:
    """
    Args:
        taken: Module, name there and full name of each parameter that an adapter keeps.
        layer: Name of what a new adapter adapts.
        base: The module of that.
        key: Its parameter, if it is a single one (target_parameters).

    Raises:
        ConfigError: the two would be about one parameter.
    """
    for module, own, name in taken:
        if module is base and key in (None, own):
            field = "target_modules" if key is None else "target_parameters"
            raise ConfigError(
                f"{name}: it is kept whole ({_FIELD}), and {layer} is adapted ({field}), which has it; leave one out"
            )


def put_in(
    model: nn.Module, config: Any, adapter_name: str, chosen: list[Place], active: list[str], on_meta: bool
) -> None:
    """Give an adapter its values, once all else of it is in the model; the config then names them in full.

    Args:
        model: The bare model.
        config: Of the adapter.
        adapter_name: Its name.
        chosen: What `choose` found.
        active: The adapters that are active now.
        on_meta: Whether values are loaded next, and have no numbers until then.
    """
    standing = {(saved.owner, saved.key): saved for saved in find(model)}
    layers = [layer for layer in model.modules() if isinstance(layer, BoneLayer)]
    is_disabled = any(layer.disable_adapters for layer in layers)
    for place in chosen:
        saved = standing.get((place.owner, place.key))
        if saved is None:
            saved = standing[place.owner, place.key] = SavedParameter(place.owner, place.key, place.name)
            saved._disable_adapters = is_disabled
        saved.update(adapter_name, adapter_name in active and not config.inference_mode, on_meta)
    for saved in standing.values():
        saved.unmerge()  # as PEFT has done with the layers
        saved._active_adapter = list(active)
        saved.bone_others |= {name: None for layer in layers for name in layer.bone_block}
    if chosen:
        config.parameters_to_save = [place.name for place in chosen]


def _places(model: nn.Module) -> Iterator[Place]:
    """Every parameter but those of adapters."""
    holders: dict[str, Any] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    uses: dict[int, list[str]] = {}
    found = []
    for path, module in model.named_modules():
        around = [(outer, path.removeprefix(f"{outer}.").partition(".")[0]) for outer in _above(path, holders)]
        if path in holders or any(child not in ("base_layer", "original_module") for _, child in around):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = bare(f"{path}.{key}".removeprefix("."))
                uses.setdefault(id(parameter), []).append(name)
                found.append((name, module, key, parameter, [holders[outer] for outer, _ in around]))
    for name, module, key, parameter, around in found:
        others = [other for other in uses[id(parameter)] if other != name]
        yield Place(name, module, key, _held(module, key, around) or _unfit(module, parameter, others))


def _above(path: str, names: dict[str, Any]) -> list[str]:
    parts = path.split(".")
    ends = (".".join(parts[:i]) for i in range(len(parts)))
    return [end for end in ends if end in names]


def _held(module: nn.Module, key: str, around: list[Any]) -> str | None:
    """Why an adapter has the parameter already."""
    for holder in around:
        if isinstance(holder, AuxiliaryTrainingWrapper):
            return "it is part of a module that is trained as a whole (modules_to_save); leave one out"
        if not isinstance(holder, ParamWrapper):
            return "it belongs to a layer that is adapted (target_modules); leave one out"
        if holder.get_base_layer() is module and holder.parameter_name == key:
            return "it is adapted (target_parameters); leave one out"
    return None


def _unfit(module: nn.Module, parameter: Any, others: list[str]) -> str | None:
    """Why the parameter is of no kind that an adapter can keep."""
    kind = type(module).__name__
    if others:
        return f"it is also {', '.join(others)}, one tensor that would be two; untie them, or leave it out"
    if offloading.is_sharded_or_offloaded(module):
        return "it is sharded or offloaded; add the adapter to a model that is whole and in memory, or leave it out"
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
        what = parameter.dtype if type(parameter) is nn.Parameter else type(parameter).__name__
        return f"it is {what}, and a plain parameter of floating-point numbers was wanted; leave it out"
    if isinstance(module, nn.RNNBase):
        return f"{with_article(kind)} holds its weights in a second place, where this is not seen; leave it out"
    if isinstance(module, torch.jit.ScriptModule):
        return "its module is a script of torch.jit, whose parameters are fixed; leave it out"
    return None


def _saved_whole(name: str, config: Any) -> str | None:
    """Whether PEFT makes a whole copy of a module that has the parameter."""
    parts = name.split(".")[:-1]
    outer = [".".join(parts[: i + 1]) for i in range(len(parts))]
    if any(path.endswith(entry) for path in outer for entry in config.modules_to_save or ()):
        return "it is part of a module that is trained as a whole (modules_to_save); leave one out"
    return None


def _near(places: list[Place], entry: str) -> str:
    free = dict.fromkeys(".".join(place.name.split(".")[-2:]) for place in places if place.reason is None)
    lasts = {ending.rpartition(".")[2]: None for ending in free}
    near = difflib.get_close_matches(entry.rpartition(".")[2], list(lasts), n=MAX_SUGGESTIONS, cutoff=0.5)
    ordered = [ending for last in near for ending in free if ending.rpartition(".")[2] == last]
    return ", ".join(list(dict.fromkeys([*ordered, *free]))[:MAX_SUGGESTIONS]) or "none that could be kept"
