"""Methods of equal size: each gets the size at which it trains as many parameters as the budget allows.

Sizes are counted, not computed: a method is attached to a copy of the model without weights, and what trains is summed.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from flashbone.compare.attaching import attach, count_trained, tuner_layers
from flashbone.compare.methods import Settings, TrainingMethod, get_method
from flashbone.errors import ConfigError
from flashbone.tuner.model.presets import parameter_count

# A size is taken where it is off the budget by no more than this share of the tolerance: two methods at opposite ends
# of the whole of it would be twice as far apart as it allows.
TIDY = 1 / 3
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Budget:
    """Parameters that an adapter may train, and where the number comes from: "bone, r = 32", or "" for a number."""

    parameters: int
    origin: str


@dataclass(frozen=True)
class MethodSize:
    """A method at a size.

    Attributes:
        size: for people: "r = 18", "r = 17 or 18", "no size".
        settings: fields of the size, for `TrainingMethod.config`; empty where the user's settings or nothing decide it.
        adapter_parameters: of the adapter that train, without heads and other modules to save; of a bound what trains
            besides a classification head.
        trainable_parameters: all that train.
        total_parameters: the model's and the adapter's; frozen random matrices of the adapter are not counted.
        off_budget: how far the adapter is off the budget, as a share of it; None of a bound.
        matched: whether that is within the tolerance; False of a bound.
        fixed: whether the size was not ours to choose: the user's settings have it, or the method has none.
    """

    size: str
    settings: dict[str, Any]
    adapter_parameters: int
    trainable_parameters: int
    total_parameters: int
    off_budget: float | None = None
    matched: bool = False
    fixed: bool = False


class LayerSize(NamedTuple):
    """An adapted layer: its sides, and how many parameters of the adapter train there."""

    in_features: int
    out_features: int
    parameters: int


class ParameterCounter:
    """Counts what methods train on one model, at any size.

    Args:
        model: Stays as it is; only names and shapes are used. Not quantised; of a classifier with as many labels as are
            trained. The skeleton of a model will do.
        target_modules: As PEFT takes them.
        task_type: "CAUSAL_LM" or "SEQ_CLS".
    """

    def __init__(self, model: nn.Module, target_modules: list[str] | str | None, task_type: str | None) -> None:
        self.model, self._targets = model, (target_modules, task_type)
        self._counts: dict[str, tuple[MethodSize, dict[str, LayerSize]]] = {}

    def count(
        self, method: TrainingMethod, settings: Settings, size: Settings
    ) -> tuple[MethodSize, dict[str, LayerSize]]:
        """The numbers at a size, and the adapted layers by their names in the model.

        Raises:
            ConfigError: the method cannot be attached with these settings at this size.
        """
        key = json.dumps([method.name, settings, size], sort_keys=True, default=str)
        if key not in self._counts:
            config = method.config(size, *self._targets, settings)
            words = method.size_words if config is None else method.describe(config)
            model = self._attached(method, config)
            adapter, trainable = count_trained(model, method)
            total = parameter_count(model) + (0 if method.is_bound else adapter)
            layers = {} if method.is_bound else _layer_sizes(model)
            self._counts[key] = MethodSize(words, dict(size), adapter, trainable, total), layers
        return self._counts[key]

    def _attached(self, method: TrainingMethod, config: Any) -> Any:
        """A copy of the model on the meta device with the method."""
        from peft.tuners.boft.layer import BOFTLayer

        if isinstance(getattr(config, "init_lora_weights", None), str):
            config.init_lora_weights = True  # to decompose no weights takes as long as to decompose some
        if hasattr(config, "mask_fn"):
            config.mask_fn = None  # SHiRA looks for its entries, which the meta device has not; their number is known
        # BOFT writes permutations entry by entry, which the meta device cannot; only their shape is needed.
        no_entries = patch.object(BOFTLayer, "perm2mat", lambda self, indices: torch.zeros(2 * (len(indices),)))
        with torch.device("meta"), torch.random.fork_rng(devices=()), no_entries:
            return attach(_meta_copy(self.model), method, config, 0)


def _meta_copy(model: Any) -> Any:
    """A copy of a model whose tensors are on the meta device; ties between them stay."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        vars(memo[id(p)]).update(vars(p))  # whether it was loaded
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


def _layer_sizes(model: Any) -> dict[str, LayerSize]:
    prefix, sizes = model.base_model.prefix, {}
    for name, layer in tuner_layers(model):
        trained = [p.numel() for key, p in layer.named_parameters() if p.requires_grad and prefix in key]
        sizes[name] = LayerSize(int(layer.in_features), int(layer.out_features), sum(trained))
    return sizes


def budget_of(spec: Mapping[str, Any] | int, counter: ParameterCounter) -> Budget:
    """The budget that is meant by a number of parameters, or by a method and its size: {"method": "bone", "r": 32}.

    Raises:
        ConfigError: the number is not positive, the method is unknown or a bound, or its size is left open.
    """
    if isinstance(spec, int) and not isinstance(spec, bool):
        if spec < 1:
            raise ConfigError(f"budget: got {spec}, wanted a positive number of parameters")
        return Budget(spec, "")
    if not isinstance(spec, Mapping) or "method" not in spec:
        raise ConfigError(
            f"budget: got {spec!r}, wanted a number of parameters, or a method and its size, such as"
            " {method: bone, r: 32}"
        )
    try:
        method = get_method(str(spec["method"]))
        settings = {name: value for name, value in spec.items() if name != "method"}
        if method.is_bound:
            raise ConfigError(f"{method.name} is a bound and has no adapter; name an adapter")
        if not method.has_fixed_size(settings):
            missing = [name for name in method.size_fields if name not in settings]
            raise ConfigError(f"{method.name}: its size is missing; set {' and '.join(missing)}")
        size, _ = counter.count(method, settings, {})
    except ConfigError as error:
        raise ConfigError(f"budget: {error}") from error
    return Budget(size.adapter_parameters, f"{method.name}, {size.size}")


def match(
    method: TrainingMethod, settings: Settings, budget: int, counter: ParameterCounter, tolerance: float = 0.03
) -> MethodSize:
    """Choose the size of a method so that its adapter has `budget` parameters, or as near as it can.

    Where no single size is within a third of the tolerance, two neighbouring ones are mixed over the layers, if the
    method can have that (`rank_pattern`). A size that the user's settings decide is kept.

    Raises:
        ConfigError: a setting is wrong, or the method cannot be attached to this model.
    """
    count = partial(counter.count, method, settings)
    fixed = method.has_fixed_size(settings)
    nearest = count({})[0] if fixed else _search(method, settings, count, budget, tolerance * TIDY)
    if method.is_bound:
        return replace(nearest, fixed=True)
    off = nearest.adapter_parameters / budget - 1
    return replace(nearest, off_budget=off, matched=abs(off) <= tolerance, fixed=fixed)


Count = Callable[[Settings], tuple[MethodSize, dict[str, LayerSize]]]


def _search(method: TrainingMethod, settings: Settings, count: Count, budget: int, near: float) -> MethodSize:
    """The nearest size of all lists; the search ends with one that is off by no more than `near`."""
    assert method.sizes is not None
    _, layers = count({method.size_fields[0]: method.smallest})  # the same at all sizes
    counted: list[MethodSize] = []
    for sizes in method.sizes(list(layers.values()), settings):
        around = _around(sizes, count, budget)
        if method.has_patterns and len(around) == 2 and not _is_near(around, budget, near):
            low, high = around
            if high.settings == low.settings | {"r": high.settings.get("r")}:
                pattern = _mix(count(low.settings)[1], count(high.settings)[1], high.settings["r"], budget, near)
                around.append(count({**low.settings, "rank_pattern": pattern})[0])
        counted += around
        if _is_near(around, budget, near):
            break
    if not counted:
        raise ConfigError(f"{method.name}: no size fits all layers; adapt others, or leave the method out")
    return min(counted, key=lambda size: abs(size.adapter_parameters - budget))


def _is_near(sizes: Sequence[MethodSize], budget: int, near: float) -> bool:
    return any(abs(size.adapter_parameters - budget) <= near * budget for size in sizes)


def _around(sizes: Sequence[Settings], count: Count, budget: int) -> list[MethodSize]:
    """The last size that stays within the budget and the first beyond it, where there are such.

    Parameters grow about as a power of the size: the search looks where that power meets the budget, not in the middle.
    """
    counts: dict[int, MethodSize] = {}
    low, high, place = -1, len(sizes), 0
    while high - low > 1:
        try:
            counts[place], _ = count(sizes[place])
        except ConfigError:  # too large for one of the layers
            high = place
        else:
            low, high = (place, high) if counts[place].adapter_parameters <= budget else (low, place)
        if high == len(sizes):
            place = high - 1
        elif low in counts and high in counts:
            start, end = counts[low].adapter_parameters, counts[high].adapter_parameters
            share = math.log(budget / start) / math.log(end / start)
            place = round((low + 1) * ((high + 1) / (low + 1)) ** share) - 1
        else:
            place = (low + high) // 2
        place = min(max(place, low + 1), high - 1)
    return [counts[place] for place in (low, high) if place in counts]


def _mix(
    low: Mapping[str, LayerSize], high: Mapping[str, LayerSize], rank: int, budget: int, near: float
) -> dict[str, int]:
    """Which layers get the larger of two ranks, as PEFT's rank_pattern: whole decoder layers where that comes near
    enough, else single modules; spread evenly over the model's depth."""
    wanted, chosen = budget - sum(layer.parameters for layer in low.values()), []
    for key_of in (_decoder_layer, re.escape):
        extras: Counter[str] = Counter()
        for name, layer in high.items():
            extras[key_of(name)] += layer.parameters - low[name].parameters
        chosen = _spread(extras, wanted)
        if abs(sum(extras[key] for key in chosen) - wanted) <= near * budget:
            break
    return dict.fromkeys(chosen, rank)


def _decoder_layer(name: str) -> str:
    """A pattern of all modules in the same decoder layer; of this module alone where it is in none."""
    layer = re.match(r".*?\.\d+(?=\.)", name)
    return rf"{re.escape(layer[0])}\..*" if layer else re.escape(name)


def _spread(extras: Mapping[str, int], wanted: int) -> list[str]:
    """Evenly spaced keys, in their order, whose extras sum to about what is wanted."""
    keys = list(extras)
    order = sorted(keys, key=lambda key: (keys.index(key) + 1) * _GOLDEN % 1)
    chosen, reached = set(), 0
    for key in order:
        if reached + extras[key] <= wanted:
            chosen.add(key)
            reached += extras[key]
    rest = [key for key in order if key not in chosen]
    last = min(rest, key=lambda key: abs(reached + extras[key] - wanted), default=None)
    if last is not None and abs(reached + extras[last] - wanted) < abs(reached - wanted):
        chosen.add(last)
    return [key for key in keys if key in chosen]
