"""Two neighbouring sizes spread over a model's layers, where no single one comes near the budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from flashbone.compare.sizes.counting import Layer

Key = TypeVar("Key")
_GOLDEN = 0.6180339887498949


def mix(
    layers: Sequence[Layer], r: int, low: Callable[[Layer], int], high: Callable[[Layer], int], target: int, near: float
) -> tuple[dict[str, int], int]:
    """Which layers get the higher size, r, as PEFT's rank_pattern; and the parameters then.

    Whole decoder layers where that comes near enough, since the pattern then is one line; else single modules. Those
    that get more are spread evenly over the model's depth.

    Args:
        layers: All adapted layers.
        r: The higher size.
        low: A layer's parameters at the lower size.
        high: A layer's parameters at the higher size.
        target: Parameters wanted.
        near: How far off they may be, as a share of the target.
    """
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        groups.setdefault(_place(layer.name), []).append(layer)
    start = sum(map(low, layers))
    extras = {place: sum(high(one) - low(one) for one in group) for place, group in groups.items()}
    chosen, reached = _spread(extras, target - start)
    if abs(reached - (target - start)) <= near * target:
        return _pattern(chosen, r), start + reached
    names, reached = _spread({layer.name: high(layer) - low(layer) for layer in layers}, target - start)
    return {re.escape(name): r for name in names}, start + reached


def _place(name: str) -> tuple[str, str]:
    """A module's list and its index there: ("model.layers", "3"); its own name where it is in none."""
    found = re.match(r"(.*?)\.(\d+)\.", name)
    return (found[1], found[2]) if found else (name, "")


def _spread(extras: dict[Key, int], wanted: int) -> tuple[list[Key], int]:
    """Keys whose extras come near what is wanted, evenly spaced, in their order; and the sum of their extras."""
    keys, chosen, reached = list(extras), set(), 0
    order = sorted(range(len(keys)), key=lambda i: (i + 1) * _GOLDEN % 1)
    for place in order:
        if reached + extras[keys[place]] <= wanted:
            chosen.add(place)
            reached += extras[keys[place]]
    rest = [place for place in order if place not in chosen]
    last = min(rest, key=lambda place: abs(reached + extras[keys[place]] - wanted), default=None)
    if last is not None and abs(reached + extras[keys[last]] - wanted) < abs(reached - wanted):
        chosen.add(last)
        reached += extras[keys[last]]
    return [keys[place] for place in sorted(chosen)], reached


def _pattern(places: list[tuple[str, str]], r: int) -> dict[str, int]:
    lists: dict[str, list[str]] = {}
    for name, index in places:
        lists.setdefault(name, []).append(index)
    return {
        rf"{re.escape(name)}\.({'|'.join(indices)})\..*" if indices != [""] else re.escape(name): r
        for name, indices in lists.items()
    }
