"""Rows as Markdown: the methods' titles, cells with their spread, tables."""

from __future__ import annotations

from collections.abc import Iterable

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


def cell(row: Row) -> str:
    """Median (quartiles), with the unit unless it is a ratio."""
    unit = row.metric.rpartition("_")[2]
    if unit == "ratio":
        return f"{row.median:.2f} ({row.q1:.2f} to {row.q3:.2f})"
    name = {"ms": "ms", "mib": "MiB"}[unit]
    return f"{_number(row.median)} {name} ({_number(row.q1)} to {_number(row.q3)})"


def _number(value: float) -> str:
    if abs(value) < 5e-4:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
