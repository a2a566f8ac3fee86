"""The table of a comparison: the same rows for the terminal, for Markdown and for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashbone.compare.report import words
from flashbone.compare.report.costs import band, common_loss, seconds_to, spread
from flashbone.compare.report.results import MethodRow
from flashbone.compare.report.statistics import Ranking

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Column:
    """A column: its head, what it means in a sentence, and whether it belongs to quality or to cost."""

    key: str
    head: str
    meaning: str
    part: str  # "name", "quality" or "cost"


@dataclass(frozen=True)
class Cell:
    """A cell's text, the number to sort by, and whether it is the best of its column for sure."""

    text: str = words.NOTHING
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A method's cells by the columns' keys; the group is "tied", "matched", "bound", "unmatched" or "failed"."""

    method: str
    group: str
    cells: dict[str, Cell]
    error: str | None


MEASURED = {  # column -> (field of RunRow, how it is written)
    "held_out": ("last_held_out", lambda value: f"{value:.4f}"),
    "step": ("step_ms", words.milliseconds),
    "peak": ("peak_mib", lambda value: f"{value:,.0f}"),
    "above": ("above_model_mib", lambda value: f"{value:,.0f}"),
    "startup": ("startup_s", lambda value: f"{value:.2f}"),
    "adapter": ("adapter_bytes", lambda value: f"{value / 2**20:,.2f}"),
    "gradient": ("grad_norm_first", lambda value: f"{value:.3g}"),
}
SMALLER_IS_BETTER = ("held_out", "step", "peak", "above", "startup")


def columns(ranking: Ranking) -> list[Column]:
    """The columns, with what they mean in this comparison."""
    header, loss = ranking.comparison.header, common_loss(ranking)
    reached = "common loss" if loss is None else f"{loss:.4f}"
    peak_of = next((run.peak_of for run in ranking.comparison.runs if run.peak_of), "memory")
    return [
        Column("method", "method", "The method, as in the configuration.", "name"),
        Column("test", f"test {words.metric(header)}", "Mean over the seeds with its 95 % interval.", "quality"),
        Column("held_out", "held-out loss", "At the end of training, mean over the seeds.", "quality"),
        Column("size", "size", "The setting that was chosen to meet the budget of parameters.", "quality"),
        Column("parameters", "adapter parameters", "The trainable ones, and how far off the budget.", "quality"),
        Column("rate", "learning rate", "The one with the best held-out figure on the first seed.", "quality"),
        Column(
            "seconds", f"s to {reached}", "Training time with start-up until the held-out loss that each of the best "
            "methods reaches: the tied ones, or the winner and the next.", "cost",
        ),
        Column("step", "step ms", "Median time of a training step.", "cost"),
        Column("peak", "peak MiB", f"Highest {peak_of} of a run.", "cost"),
        Column("above", "above model MiB", "Peak while training above what the loaded model takes.", "cost"),
        Column("startup", "start-up s", "Making the adapter, with any decomposition of weights.", "cost"),
        Column("adapter", "adapter MiB", "The adapter's file.", "cost"),
        Column("gradient", "first gradient", "Norm of the gradient in the first step.", "cost"),
    ]  # fmt: skip


def rows(ranking: Ranking) -> list[Row]:
    """Candidates from best to worst, then bounds, unmatched methods and those without a figure."""
    comparison, loss = ranking.comparison, common_loss(ranking)
    sure = _sure(ranking)
    order = {"tied": 0, "matched": 0, "bound": 1, "unmatched": 2, "unfinished": 3, "failed": 4}
    place = {key: number for number, key in enumerate(ranking.ranked)}
    made = [
        Row(m.method, _group(ranking, m), _cells(ranking, m, loss, sure), m.error if m.status == "failed" else None)
        for m in comparison.methods
    ]
    return sorted(made, key=lambda row: (order[row.group], place.get(row.method, len(place))))


def _group(ranking: Ranking, method: MethodRow) -> str:
    if method.status == "failed":
        return "failed"
    if method.bound or not method.matched:
        return "bound" if method.bound else "unmatched"
    if method.method in ranking.tied:
        return "tied"
    return "matched" if method.method in ranking.ranked else "unfinished"


def _cells(ranking: Ranking, method: MethodRow, loss: float | None, sure: set[tuple[str, str]]) -> dict[str, Cell]:
    comparison, key = ranking.comparison, method.method
    cells = {
        "method": Cell(comparison.label(key)),
        "size": Cell(method.size),
        "parameters": _parameters(method),
        "rate": Cell() if method.chosen is None else Cell(words.rate(method.chosen) + _edge(method), method.chosen),
    }
    if estimate := ranking.estimates.get(key):
        text = words.estimate(comparison.header, estimate)
        cells["test"] = Cell(text, estimate.mean, ranking.winner == key)
    elif comparison.counted(key):
        cells["test"] = Cell("not finite")
    for name, (field, write) in MEASURED.items():
        if (found := spread(comparison, key, field)) is not None:
            cells[name] = Cell(write(found.mean), found.mean, (name, key) in sure)
    curve = band(comparison.counted(key), "held_out")
    if curve and loss is not None:
        seconds = seconds_to(curve, loss)
        cells["seconds"] = Cell("not reached") if seconds is None else Cell(f"{seconds:,.1f}", seconds)
    return cells


def _parameters(method: MethodRow) -> Cell:
    if method.adapter_parameters is None:
        return Cell()
    off = f"{100 * (method.off_budget or 0):+.1f}"
    beside = "" if float(off) == 0 else f" ({off.replace('-', words.MINUS)} %)"
    return Cell(f"{method.adapter_parameters:,}{beside}", method.adapter_parameters)


def _edge(method: MethodRow) -> str:
    return " (edge)" if method.at_edge and len(method.learning_rates) > 1 else ""


def _sure(ranking: Ranking) -> set[tuple[str, str]]:
    """(column, method) where a candidate's worst seed is better than every other candidate's best seed. Nothing is
    sure with a single seed."""
    sure = set()
    for name in SMALLER_IS_BETTER:
        found = {key: spread(ranking.comparison, key, MEASURED[name][0]) for key in ranking.ranked}
        ends = sorted((s.high, s.low, key) for key, s in found.items() if s is not None)
        seeds = min((len(ranking.estimates[key].seeds) for key in ranking.ranked), default=0)
        if len(ends) > 1 and seeds > 1 and all(ends[0][0] < low for _, low, _ in ends[1:]):
            sure.add((name, ends[0][2]))
    return sure


def describe(row: Row, ranking: Ranking) -> str:
    """What stands beside a method's name: its group, where that is not simply matched."""
    if row.group == "tied":
        return "best" if ranking.winner else "tied" if len(ranking.tied) > 1 else ""
    return {"matched": "", "unmatched": "not matched"}.get(row.group, row.group)


def markdown(ranking: Ranking) -> str:
    """The table in Markdown; best figures are bold where they are not tied."""
    shown = columns(ranking)
    lines = [
        "| " + " | ".join(_escape(column.head) for column in shown) + " |",
        "|" + "|".join(" --- " if c.key in ("method", "size") else " ---: " for c in shown) + "|",
    ]
    for row in rows(ranking):
        cells = []
        for column in shown:
            cell = row.cells.get(column.key, Cell())
            cells.append(f"**{_escape(cell.text)}**" if cell.best else _escape(cell.text))
        if note := describe(row, ranking):
            cells[0] += f" ({note})"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    for letter in "\\|*_`<[":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("\n", " ")


def terminal(ranking: Ranking) -> list[Table]:
    """Two tables for the terminal, which is narrow: what methods reached, and what they cost."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    header, tables = ranking.comparison.header, []
    titles = {"quality": f"{header.name}: what the methods reached", "cost": f"{header.name}: what they cost"}
    for part, title in titles.items():
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        shown = [column for column in columns(ranking) if column.part in ("name", part)]
        for column in shown:
            side = "left" if column.key in ("method", "size") else "right"
            table.add_column(column.head, justify=side, overflow="fold")
        for row in rows(ranking):
            if part == "cost" and row.group in ("failed", "unfinished"):
                continue
            cells = [row.cells.get(column.key, Cell()) for column in shown]
            texts = [Text(cell.text, style="bold" if cell.best else "") for cell in cells]
            if note := describe(row, ranking):
                texts[0].append(f" ({note})", style="dim")
            table.add_row(*texts, style="dim" if row.group == "failed" else "")
        tables.append(table)
    return tables
