"""Rows as Markdown: cells with their spread, tables of methods by size, captions that say where figures come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.methods import METHODS
from benchmarks.rows import Row

TITLES = {
    **{name: method.title for name, method in METHODS.items()},
    "import-peft": "`import peft`",
    "import-flashbone": "`import flashbone`",
    "import-both": "`import flashbone, peft`",
    "copy": "`cp -r` of the checkpoint",
    "merge-command": "`flashbone merge`",
}


def is_current(row: Row) -> bool:
    """Whether it was measured with the installed PEFT, not with the old one beside it."""
    return "flashbone" in row.versions


def is_floor(row: Row) -> bool:
    """Whether its method is what the others are compared with in every benchmark of layers and steps."""
    return row.method == "frozen"


def label(row: Row) -> str:
    """The method's title, with the number of its adapters if there are several."""
    return TITLES[row.method] + (f", {row.adapters} adapters" if row.adapters > 1 else "")


def cell(row: Row) -> str:
    """Median (quartiles), with the unit unless it is a ratio."""
    unit = row.metric.rpartition("_")[2]
    if unit == "ratio":
        return f"{row.median:.3f} ({row.q1:.3f} to {row.q3:.3f})"
    name = {"ms": "ms", "mib": "MiB"}[unit]
    return f"{_number(row.median)} {name} ({_number(row.q1)} to {_number(row.q3)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def pivot(rows: list[Row], name: Callable[[Row], str], column: Callable[[Row], str], first: str = "method") -> str:
    """One line for each name, one column for each kind of figure, both in the order in which they first occur.

    `first` heads the names.
    """
    columns = list(dict.fromkeys(column(row) for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(name(row), {})[column(row)] = cell(row)
    return table([first, *columns], [[key, *(found.get(c, "") for c in columns)] for key, found in lines.items()])


def caption(rows: list[Row], what: str) -> str:
    """What the figures are, and the run that they come from."""
    first = next((row for row in rows if is_current(row)), rows[0])
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    rounds = f"{first.n} round{'s' if first.n > 1 else ''}"
    run = f"commit {first.commit}, {first.date} UTC, {first.device}, {first.dtype}; {versions}"
    return f"*{what}; median (quartiles) of {rounds}; {run}.*"
