"""The sizes that a method can have on given layers, and how many parameters each of them trains."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flashbone import variants
from flashbone.compare.methods.registry import Method
from flashbone.compare.sizes.counting import Layer

Settings = dict[str, Any]


def families(method: Method, layers: Iterable[Layer], settings: Mapping[str, Any]) -> list[list[Settings]]:
    """Lists of sizes, each by rising size; the first is tried first, the others where it does not come near enough."""
    inputs = {layer.in_features for layer in layers}
    outputs = {layer.out_features for layer in layers}
    shorter = [min(layer.in_features, layer.out_features) for layer in layers]
    ranks = {
        "bone": min(inputs),  # more rows than inputs would have nothing to do; the same for the next two
        "miss": min(inputs),
        "orthogonal": min(inputs),
        "lora": max(shorter),
        "rslora": max(shorter),
        "dora": max(shorter),
        "pissa": min(shorter),  # W has no more directions
        "olora": min(shorter),
        # Its random matrices have r rows: with more than the layer's larger side, each adapted layer would cost more
        # than two of the frozen ones. The paper's largest is 1024.
        "vera": max(inputs | outputs),
    }
    if method.name in ("bat-row", "bat-col"):
        # Blocks that fit whole come first: of those that hang over a layer's edge a part is trained for nothing.
        whole = [{"r": r} for r in _divisors(inputs | outputs)]
        return [whole, [{"r": r} for r in range(1, min(shorter) + 1)]]
    if method.name in ranks:
        return [[{"r": r} for r in range(1, ranks[method.name] + 1)]]
    if method.name == "mini":
        return _mini(min(inputs), outputs, settings)
    if method.name == "hra":  # an odd number of reflections is no identity at the start
        return [[{"r": r} for r in range(2, min(inputs) + 1, 2)]]
    if method.name == "oft":
        return [
            [{"oft_block_size": b, "r": 0} for b in _divisors(inputs) if b > 1],
            [{"r": n, "oft_block_size": 0} for n in reversed(_divisors(inputs)) if n < min(inputs)],
        ]
    if method.name == "boft":
        factors = 2 ** (settings.get("boft_n_butterfly_factor", 1) - 1)
        even = 1 if factors == 1 else 2
        blocks = [b for b in _divisors(inputs) if b % even == 0 and all(i % (b * factors) == 0 for i in inputs)]
        numbers = [
            n for n in reversed(_divisors(inputs)) if n % factors == 0 and all(i // n % even == 0 for i in inputs)
        ]
        return [
            [{"boft_block_size": b, "boft_block_num": 0} for b in blocks if b > 1],
            [{"boft_block_num": n, "boft_block_size": 0} for n in numbers if n < min(inputs)],
        ]
    raise AssertionError(f"{method.name} has no sizes")


def _mini(shortest_input: int, outputs: set[int], settings: Mapping[str, Any]) -> list[list[Settings]]:
    """One of its two sizes is varied: mini_r where r is given, else r. A block half as wide as the narrowest layer is
    used twice or more, and is so what mini is about; one that divides all layers is used equally often everywhere. For
    budgets that no such block reaches there is the one as wide as the narrowest layer."""
    if "r" in settings:
        return [[{"r": settings["r"], "mini_r": m} for m in range(1, min(outputs) + 1)]]
    half = min(outputs) // 2
    width = max((d for d in _divisors(outputs) if 8 <= d <= half), default=max(1, half))
    widths = [settings["mini_r"]] if settings.get("mini_r") else [width, min(outputs)]
    return [[{"r": r, "mini_r": m} for r in range(1, shortest_input + 1)] for m in widths]


def _divisors(numbers: Iterable[int]) -> list[int]:
    """Common divisors, rising."""
    common = math.gcd(*numbers)
    return [d for d in range(1, common + 1) if common % d == 0]


def layer_parameters(method: Method, settings: Mapping[str, Any]) -> Callable[[Layer], int]:
    """Trained parameters of a layer at a size. What the user's settings add to that is seen when the method has been
    attached, see `match`."""
    if method.config_class == "BoneConfig":
        variant, r, mini_r = variants.get(method.identity["variant"]), settings["r"], settings.get("mini_r", 1)
        return lambda layer: math.prod(variant.block_shape(layer.out_features, layer.in_features, r, mini_r))
    if method.name == "oft":
        return lambda layer: layer.in_features * (_block(layer, settings["oft_block_size"], settings["r"]) - 1) // 2
    if method.name == "boft":
        factors = settings.get("boft_n_butterfly_factor", 1)

        def butterfly(layer: Layer) -> int:
            block = _block(layer, settings["boft_block_size"], settings["boft_block_num"])
            return factors * layer.in_features * block + layer.out_features

        return butterfly
    r = settings["r"]
    formulas: dict[str, Callable[[Layer], int]] = {
        "dora": lambda layer: r * (layer.in_features + layer.out_features) + layer.out_features,
        "hra": lambda layer: r * layer.in_features,
        "vera": lambda layer: r + layer.out_features,
        "miss": lambda layer: r * layer.out_features,
    }
    return formulas.get(method.name, lambda layer: r * (layer.in_features + layer.out_features))


def _block(layer: Layer, size: int, number: int) -> int:
    return size or layer.in_features // number


def totals(method: Method, layers: Iterable[Layer], sizes: Iterable[Mapping[str, Any]]) -> list[int]:
    """Trained parameters of all layers, for each of several sizes."""
    shapes = Counter((layer.out_features, layer.in_features) for layer in layers)  # a model has few
    found = []
    for size in sizes:
        parameters = layer_parameters(method, size)
        found.append(sum(number * parameters(Layer("", *shape)) for shape, number in shapes.items()))
    return found
