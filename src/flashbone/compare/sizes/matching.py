"""The size of a method at which as many parameters train as a budget says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashbone.compare.methods.registry import Method
from flashbone.compare.sizes.candidates import Settings, families, layer_parameters, totals
from flashbone.compare.sizes.counting import Count, Counter, Layer
from flashbone.compare.sizes.mixing import mix

# A single size is taken where it is off by no more than this share of the tolerance: two methods at opposite ends of
# the whole of it would lie twice as far apart as it allows.
TIDY = 1 / 3


@dataclass(frozen=True)
class Sized:
    """A method at a size.

    Attributes:
        method: its name.
        settings: fields of the size, for `Method.config`; empty where the user's settings or nothing decide it.
        adapter_parameters: of the adapter that train, without heads and other modules to save; of a bound what trains
            besides a classification head.
        trainable_parameters: all that train.
        total_parameters: the model's and the adapter's; frozen random matrices of the adapter are not counted.
        off_budget: (adapter_parameters - budget) / budget; None of a bound.
        matched: whether that is within the tolerance; False of a bound.
        fixed: whether the size was not ours to choose: the user's settings have it, or the method has none.
        size: for people: "r = 18", "block 32", "r = 17 or 18", "no size".
    """

    method: str
    settings: Settings
    adapter_parameters: int
    trainable_parameters: int
    total_parameters: int
    off_budget: float | None
    matched: bool
    fixed: bool
    size: str


def match(
    method: Method,
    budget: int,
    build_model: Callable[[], Any],
    target_modules: list[str] | str | None,
    task_type: str | None,
    settings: Mapping[str, Any] | None = None,
    tolerance: float = 0.03,
) -> Sized:
    """Choose the size of a method so that its adapter has `budget` parameters, or as near as it can.

    Where no single size is within a third of the tolerance, two neighbouring ones are mixed over the layers, if the
    method can have that (`rank_pattern`); else the nearest is taken, and `matched` says whether it is within the
    tolerance. Everything in the result is counted on the adapter that PEFT attaches, on torch's meta device: no weights
    are needed or computed.

    Args:
        method: Of `METHODS`.
        budget: Parameters of the adapter, see `budget_of`.
        build_model: Makes the model, not quantised; `skeleton(folder, task_type=...)` where the model has a config,
            else the real one (RWKV's `.pth`, GGUF); of a classifier with as many labels as are trained. It is called
            once, and only names and shapes are kept.
        target_modules: As PEFT takes them.
        task_type: "CAUSAL_LM" or "SEQ_CLS".
        settings: The user's fields of the configuration; those that decide the size are kept.
        tolerance: How far off the budget still counts as equal, as a share of it.

    Raises:
        ConfigError: a setting is wrong, or the method cannot be attached to this model.
    """
    settings = dict(settings or {})
    counter = Counter(method, build_model, target_modules, task_type, settings)
    if is_fixed(method, settings):
        return _sized(method, {}, settings, counter(None), budget, tolerance, fixed=True)
    layers = counter.layers()
    best: Sized | None = None
    aim, tried = budget, []
    for _ in range(3):  # settings may add to what a size alone makes, such as biases of LoRA; then the aim is corrected
        size, predicted = _choose(method, layers, aim, settings, tolerance * TIDY)
        if size in tried:
            break
        tried.append(size)
        found = _sized(method, size, settings, counter(size), budget, tolerance, fixed=False)
        if best is None or _off(found) < _off(best):
            best = found
        if found.adapter_parameters == predicted:
            break
        aim = max(1, aim + budget - found.adapter_parameters)
    assert best is not None
    return best


def is_fixed(method: Method, settings: Mapping[str, Any]) -> bool:
    """Whether these settings decide the method's size, or it has none. mini has two, of which one can be left."""
    if method.name == "mini":
        return "rank_pattern" in settings or {"r", "mini_r"} <= set(settings)
    return not set(method.size_fields) or bool(set(method.size_fields) & set(settings))


def _choose(
    method: Method, layers: tuple[Layer, ...], aim: int, settings: Mapping[str, Any], near: float
) -> tuple[Settings, int]:
    """The size, and the parameters that it makes by itself."""
    nearest: list[tuple[Settings, int]] = []
    for sizes in families(method, layers, settings):
        counts = totals(method, layers, [{**settings, **size} for size in sizes])
        if not counts:
            continue
        count, size = min(zip(counts, sizes, strict=True), key=lambda pair: abs(pair[0] - aim))
        nearest.append((size, count))
        if abs(count - aim) <= near * aim:
            return size, count
        if method.has_patterns:
            mixed = _mixed(method, layers, aim, settings, near, dict(zip(counts, sizes, strict=True)))
            if mixed is not None:
                return mixed
    return min(nearest, key=lambda pair: abs(pair[1] - aim))


def _mixed(
    method: Method,
    layers: tuple[Layer, ...],
    aim: int,
    settings: Mapping[str, Any],
    near: float,
    sizes: dict[int, Settings],
) -> tuple[Settings, int] | None:
    """The nearest sizes above and below, mixed; None where the aim does not lie between two."""
    below, above = [c for c in sizes if c <= aim], [c for c in sizes if c > aim]
    if not below or not above:
        return None
    low, high = sizes[max(below)], sizes[min(above)]
    if low.get("mini_r") != high.get("mini_r"):
        return None  # the pattern holds r only
    of_low, of_high = (layer_parameters(method, {**settings, **size}) for size in (low, high))
    pattern, count = mix(layers, high["r"], of_low, of_high, aim, near)
    return ({**low, "rank_pattern": pattern} if pattern else low), count


def _sized(
    method: Method,
    size: Settings,
    settings: Mapping[str, Any],
    count: Count,
    budget: int,
    tolerance: float,
    *,
    fixed: bool,
) -> Sized:
    off = None if method.is_bound else (count.adapter - budget) / budget
    return Sized(
        method=method.name,
        settings=size,
        adapter_parameters=count.adapter,
        trainable_parameters=count.trainable,
        total_parameters=count.total,
        off_budget=off,
        matched=off is not None and abs(off) <= tolerance,
        fixed=fixed,
        size=describe(method, {**settings, **size}),
    )


def _off(sized: Sized) -> float:
    return abs(sized.off_budget or 0.0)


def describe(method: Method, fields: Mapping[str, Any]) -> str:
    """The size in words."""
    if method.is_bound:
        return "all parameters" if method.name == "full" else "the head"
    if not method.has_size:
        return "no size"
    block = fields.get("oft_block_size") or fields.get("boft_block_size")
    number = fields.get("boft_block_num") or (fields.get("r") if method.name == "oft" else None)
    if block or number:
        return f"block {block}" if block else f"{number} block{'s' if number != 1 else ''}"
    r = fields.get("r") or fields.get("bottleneck_size")
    if r is None:
        return "default"
    ranks = sorted({r, *(fields.get("rank_pattern") or {}).values()})
    text = f"r = {' or '.join(map(str, ranks))}" if len(ranks) < 3 else f"r = {ranks[0]} to {ranks[-1]}"
    return f"{text}, mini_r = {fields.get('mini_r', 1)}" if method.name == "mini" else text
