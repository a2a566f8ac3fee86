"""The sizes that methods can have on given layers: lists by rising parameters, for `sizes.match` to search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Settings = Mapping[str, Any]
# (the adapted layers, the user's settings) -> lists of sizes, each list by rising size. The second list is tried where
# the first does not come near the budget.
SizeLists = Callable[[Sequence[Any], Settings], list[list[dict[str, Any]]]]


def ranks(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Every r up to the smallest input; more rows would have nothing to do."""
    return [[{"r": r} for r in range(1, min(layer.in_features for layer in layers) + 1)]]


def directions(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Every r up to the shortest side of a layer; W has no more directions."""
    return [[{"r": r} for r in range(1, min(map(shorter_side, layers)) + 1)]]


def squares(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Edges of blocks that divide every layer; then others, of whose last block a part trains for nothing."""
    whole = _divisors([side for layer in layers for side in (layer.in_features, layer.out_features)])
    return [[{"r": r} for r in whole], *directions(layers, settings)]


def tiles(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Tiles used at least twice in each layer, and equally often everywhere where a divisor allows that; then tiles as
    wide as the narrowest layer. A size that the user sets is kept, and the other varied."""
    outputs = [layer.out_features for layer in layers]
    if "r" in settings:
        return [[{"mini_r": width} for width in range(1, min(outputs) + 1)]]
    half = max((d for d in _divisors(outputs) if 2 * d <= min(outputs)), default=1)
    widths = [settings["mini_r"]] if "mini_r" in settings else [half, min(outputs)]
    return [[{**size, "mini_r": width} for size in ranks(layers, settings)[0]] for width in widths]


def blocks(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Blocks that divide the inputs of all layers; one of 1 would rotate nothing."""
    return [[{"oft_block_size": d} for d in _divisors([layer.in_features for layer in layers]) if d > 1]]


def halves(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Even ranks, each half of which is that of two sub-blocks, with alpha = 2 r."""
    return [[{**size, "alpha": 2 * size["r"]} for size in ranks(layers, settings)[0] if size["r"] % 2 == 0]]


def circles(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Circulant blocks that divide all layers, the largest first: the fewest parameters."""
    sides = [side for layer in layers for side in (layer.in_features, layer.out_features)]
    return [[{"block_size": d} for d in reversed(_divisors(sides))]]


def _divisors(numbers: Sequence[int]) -> list[int]:
    """Common divisors, rising."""
    common = math.gcd(*numbers)
    return [d for d in range(1, common + 1) if common % d == 0]


def shorter_side(layer: Any) -> int:
    return min(layer.in_features, layer.out_features)
