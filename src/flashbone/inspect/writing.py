"""How names and numbers are written: many modules on one line, and numbers to three digits with a unit."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class NameGroup:
    """Names that differ in their numbers only.

    Attributes:
        pattern: all of them in one: `model.layers.{0..3,5}.mlp.up_proj`.
        names: each of them, in the model's order.
    """

    pattern: str
    names: tuple[str, ...]


def group_names(names: Iterable[tuple[str, Hashable]]) -> list[NameGroup]:
    """Group names that differ in numbers only and whose attributes are equal; in order of appearance."""
    groups: dict[Hashable, dict[tuple[int, ...], str]] = {}
    for name, attribute in names:
        parts = re.split(r"(?<![^.])(\d+)(?![^.])", name)  # numbers that are a whole part of the name
        groups.setdefault((tuple(parts[::2]), attribute), {})[tuple(map(int, parts[1::2]))] = name
    result = []
    for (texts, _), members in groups.items():  # pyright: ignore[reportGeneralTypeIssues]
        for axes in _boxes(list(members)):
            inside = (all(n in axis for n, axis in zip(point, axes, strict=True)) for point in members)
            names_inside = tuple(name for name, is_in in zip(members.values(), inside, strict=True) if is_in)
            numbers = [*map(_ranges, axes), ""]
            result.append(NameGroup("".join(t + n for t, n in zip(texts, numbers, strict=True)), names_inside))
    return result


def _boxes(points: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Products of sets of numbers that together contain every point exactly once."""
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


def _ranges(numbers: tuple[int, ...]) -> str:
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


def times(names: str, count: int) -> str:
    """`layers.{0..31}.o_proj x 32`; a single name as it is."""
    return f"{names} x {count}" if count > 1 else names


def broken(name: str, width: int) -> str:
    """A dotted name in lines of at most `width` columns, as far as its parts allow: broken before a dot, or before the
    ` x 32` at its end."""
    lines = [""]
    for part in re.findall(r" x \d+$|[.]?[^. ]+(?:[.][.][^. ]+)*", name):
        indent = 2 if len(lines) > 1 else 0
        if lines[-1] and indent + len(lines[-1]) + len(part) > width:
            lines.append(part.lstrip(" "))
        else:
            lines[-1] += part
    return "\n  ".join(lines)


def size(count: float) -> str:
    """Bytes, in the largest unit that leaves at least 1: `26.4 MiB`."""
    unit = 0
    while round(count) >= 1024 and unit + 1 < len(UNITS):
        count, unit = count / 1024, unit + 1
    return f"{_three(count) if unit else f'{count:,.0f}'} {UNITS[unit]}"


def number(count: float) -> str:
    """A count in short: `524,288` to six digits, then `13.1 M`, `6.74 B`."""
    if count < 999_999.5:  # rounding takes the rest to the next unit
        return f"{count:,.0f}"
    return f"{_three(count / 1e6)} M" if count < 999.5e6 else f"{_three(count / 1e9)} B"


def percent(share: float) -> str:
    """To three digits: `0.124 %`, `1.30 %`."""
    return f"{share:#.3g} %" if share < 99.95 else f"{share:,.0f} %"


def sizes(shape: tuple[int, ...]) -> str:
    """`64 x 4096`."""
    return " x ".join(map(str, shape))


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
