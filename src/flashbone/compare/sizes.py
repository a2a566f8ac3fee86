"""Methods of equal size: each gets the size at which it trains as many parameters as the budget allows.

Sizes are counted (`counting.py`), not computed: no method needs a formula here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from flashbone.compare.counting import ParameterCount, ParameterCounter
from flashbone.compare.methods import Settings, TrainingMethod, get_method
from flashbone.errors import ConfigError

# A size is taken where it is off the budget by no more than this share of the tolerance: two methods at opposite ends
# of the whole of it would be twice as far apart as it allows.
TIDY = 1 / 3
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class MethodSize:
    """A method at a size.

    Attributes:
        settings: fields of the size, for `TrainingMethod.config`; empty where the user's settings or nothing decide it.
        adapter_parameters: of the adapter that train, without heads and other modules to save; of a bound what trains
            besides a classification head.
        trainable_parameters: all that train.
        total_parameters: the model's and the adapter's; frozen random matrices of the adapter are not counted.
        off_budget: (adapter_parameters - budget) / budget; None of a bound.
        matched: whether that is within the tolerance; False of a bound.
        fixed: whether the size was not ours to choose: the user's settings have it, or the method has none.
        size: for people: "r = 18", "r = 17 or 18", "no size".
    """

    settings: dict[str, Any]
    adapter_parameters: int
    trainable_parameters: int
    total_parameters: int
    off_budget: float | None
    matched: bool
    fixed: bool
    size: str


@dataclass(frozen=True)
class Budget:
    """Parameters that an adapter may train, and where the number comes from: "bone, r = 32", or "" for a number."""

    parameters: int
    origin: str


def budget_of(
    spec: Mapping[str, Any] | int, model: nn.Module, target_modules: list[str] | str | None, task_type: str | None
) -> Budget:
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
        count = ParameterCounter(method, model, target_modules, task_type, settings)({})
    except ConfigError as error:
        raise ConfigError(f"budget: {error}") from error
    return Budget(count.adapter, f"{method.name}, {count.words}")


def match(
    method: TrainingMethod,
    budget: int,
    model: nn.Module,
    target_modules: list[str] | str | None,
    task_type: str | None,
    settings: Settings,
    tolerance: float = 0.03,
) -> MethodSize:
    """Choose the size of a method so that its adapter has `budget` parameters, or as near as it can.

    Where no single size is within a third of the tolerance, two neighbouring ones are mixed over the layers, if the
    method can have that (`rank_pattern`). A size that the user sets is kept.

    Args:
        method: One of `METHODS`.
        budget: Parameters of the adapter, see `budget_of`.
        model: As `ParameterCounter` takes it; of a classifier with as many labels as are trained.
        target_modules: As PEFT takes them.
        task_type: "CAUSAL_LM" or "SEQ_CLS".
        settings: The user's fields of the configuration.
        tolerance: How far off the budget still counts as equal, as a share of it.

    Raises:
        ConfigError: a setting is wrong, or the method cannot be attached to this model.
    """
    count = ParameterCounter(method, model, target_modules, task_type, settings)
    fixed = method.has_fixed_size(settings)
    nearest = count({}) if fixed else _search(count, budget, settings, tolerance * TIDY)
    off = None if method.is_bound else nearest.adapter / budget - 1
    return MethodSize(
        settings=nearest.settings,
        adapter_parameters=nearest.adapter,
        trainable_parameters=nearest.trainable,
        total_parameters=nearest.total,
        off_budget=off,
        matched=off is not None and abs(off) <= tolerance,
        fixed=fixed,
        size=nearest.words,
    )


def _search(count: ParameterCounter, budget: int, settings: Settings, near: float) -> ParameterCount:
    """The nearest size of all lists; the search ends with one that is off by no more than `near`."""
    method, counts = count.method, []
    assert method.sizes is not None
    for sizes in method.sizes(count.layers(), settings):
        around = _around(sizes, count, budget)
        if method.has_patterns and len(around) == 2:
            low, high = around
            is_near = min(budget - low.adapter, high.adapter - budget) <= near * budget
            if not is_near and high.settings == low.settings | {"r": high.settings.get("r")}:
                around.append(count({**low.settings, "rank_pattern": _mix(low, high, budget, near)}))
        counts += around
        if any(abs(one.adapter - budget) <= near * budget for one in around):
            break
    if not counts:
        raise ConfigError(f"{method.name}: no size fits all layers; adapt others, or leave the method out")
    return min(counts, key=lambda one: abs(one.adapter - budget))


def _around(sizes: Sequence[Settings], count: ParameterCounter, budget: int) -> list[ParameterCount]:
    """The last size that stays within the budget and the first beyond it, where there are such.

    Parameters grow about as a power of the size: the search looks where that power meets the budget, not in the middle.
    """
    counts: dict[int, ParameterCount] = {}
    low, high, place = -1, len(sizes), 0
    while high - low > 1:
        try:
            counts[place] = count(sizes[place])
        except ConfigError:  # too large for one of the layers
            high = place
        else:
            low, high = (place, high) if counts[place].adapter <= budget else (low, place)
        if high == len(sizes):
            place = high - 1
        elif low in counts and high in counts:
            start, end = counts[low].adapter, counts[high].adapter
            share = math.log(budget / start) / math.log(end / start)
            place = round((low + 1) * ((high + 1) / (low + 1)) ** share) - 1
        else:
            place = (low + high) // 2
        place = min(max(place, low + 1), high - 1)
    return [counts[place] for place in (low, high) if place in counts]


def _mix(low: ParameterCount, high: ParameterCount, budget: int, near: float) -> dict[str, int]:
    """Which layers get the larger of two ranks, as PEFT's rank_pattern: whole decoder layers where that comes near
    enough, else single modules; spread evenly over the model's depth."""
    rank: int = high.settings["r"]
    wanted, chosen = budget - low.adapter, []
    for key_of in (_decoder_layer, re.escape):
        extras: Counter[str] = Counter()
        for name, parameters in high.layers.items():
            extras[key_of(name)] += parameters - low.layers[name]
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
