"""Many module names on one line: `layers.0.o_proj`, `layers.1.o_proj`, ... is `layers.{0..31}.o_proj`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fold:
    """Modules that differ in the numbers of their names only.

    Attributes:
        pattern: their names in one: `model.layers.{0..3,5}.mlp.up_proj`.
        names: all of them, in the model's order.
    """

    pattern: str
    names: tuple[str, ...]


def fold(modules: Iterable[tuple[str, Hashable]]) -> list[Fold]:
    """Group modules by name without numbers and by an attribute in which they must agree; in order of appearance."""
    groups: dict[Hashable, dict[tuple[int, ...], str]] = {}
    for name, attribute in modules:
        parts = re.split(r"(?<![^.])(\d+)(?![^.])", name)  # numbers that are a whole part of the name
        groups.setdefault((tuple(parts[::2]), attribute), {})[tuple(map(int, parts[1::2]))] = name
    folds = []
    for (texts, _), names in groups.items():  # pyright: ignore[reportGeneralTypeIssues]
        for box in _boxes(list(names)):
            numbers = [_listing(axis) for axis in box]
            pattern = "".join(text + number for text, number in zip(texts, [*numbers, ""], strict=True))
            folds.append(Fold(pattern, tuple(name for point, name in names.items() if _inside(point, box))))
    return folds


def _boxes(points: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Products of sets of numbers that hold every point exactly once."""
    if not points[0]:
        return [()]
    below: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in points:
        below.setdefault(first, []).append(tuple(rest))
    firsts: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rests in below.items():
        for box in _boxes(rests):
            firsts.setdefault(box, []).append(first)
    return [(tuple(sorted(axis)), *box) for box, axis in firsts.items()]


def _inside(point: tuple[int, ...], box: tuple[tuple[int, ...], ...]) -> bool:
    return all(number in axis for number, axis in zip(point, box, strict=True))


def _listing(numbers: tuple[int, ...]) -> str:
    """`3`, `{0..31}`, `{0..3,5}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    if runs == [[numbers[0]]]:
        return str(numbers[0])
    return "{" + ",".join("..".join(map(str, run)) for run in runs) + "}"
