"""The table of a comparison: one list of columns, shown in the terminal, in Markdown and in the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from flashbone.compare.report import words
from flashbone.compare.report.costs import spread
from flashbone.compare.report.ranking import Ranking
from flashbone.compare.report.speed import NEVER, Speeds
from flashbone.compare.results import MethodRow

if TYPE_CHECKING:
    from flashbone.printing import Table

GROUPS = ("tied", "matched", "bound", "unmatched", "unfinished", "failed")  # in the order of the table


@dataclass(frozen=True)
class TableCell:
    """A cell's text, the number to sort by, and whether it is the best of its column for sure."""

    text: str = words.NOTHING
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class TableColumn:
    """A column.

    Attributes:
        key: Its name; in a column of means over the runs, the field of `RunRow`.
        head: Its head, with the unit.
        meaning: What it means, in a sentence.
        part: Whether it is about "quality", "speed" or "cost".
        write: How a mean over the runs is written; None in columns of something else.
        lowest_is_best: Whether the lowest mean may be bold.
    """

    key: str
    head: str
    meaning: str
    part: str
    write: Callable[[float], str] | None = None
    lowest_is_best: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it holds text, not numbers."""
        return self.key in ("method", "size", "leeway")


@dataclass(frozen=True)
class TableRow:
    """A method's cells in the order of the columns, its group, and a note beside its name."""

    method: str
    group: str
    note: str
    cells: dict[str, TableCell]
    error: str | None


@dataclass(frozen=True)
class ResultsTable:
    """The columns and rows of a comparison."""

    columns: tuple[TableColumn, ...]
    rows: tuple[TableRow, ...]


def results_table(ranking: Ranking) -> ResultsTable:
    """Candidates from best to worst, then bounds, unmatched methods and those without a figure."""
    speed, rows = ranking.speeds, []
    columns = _columns(ranking, speed)
    best = {column.key: _surely_lowest(ranking, column.key) for column in columns if column.lowest_is_best}
    for method in ranking.results.methods:
        key, group = method.method, _group(ranking, method)
        cells = {column.key: TableCell() for column in columns} | _cells(ranking, method, speed)
        for column in columns:
            if column.write and (figure := spread(ranking.results, key, column.key)) is not None:
                cells[column.key] = TableCell(column.write(figure.mean), figure.mean, best.get(column.key) == key)
        rows.append(TableRow(key, group, _note(ranking, group), cells, method.error if group == "failed" else None))
    place = {key: number for number, key in enumerate(ranking.ranked)}
    rows.sort(key=lambda row: (max(1, GROUPS.index(row.group)), place.get(row.method, len(place))))
    return ResultsTable(columns, tuple(rows))


def _columns(ranking: Ranking, speed: Speeds | None) -> tuple[TableColumn, ...]:
    metric, whole, column = words.metric(ranking.results.header), "{:,.0f}".format, TableColumn
    peak_of = next((run.peak_of for run in ranking.results.runs if run.peak_of), "memory")
    answers = ranking.results.header.metric == "loss" and any(
        "exact_match" in (r.test or {}) for r in ranking.results.runs
    )
    above = "Peak while training above what the loaded model takes."
    return (
        column("method", "method", "The method, as in the configuration.", "both"),
        column("test", f"test {metric}", "Mean over the seeds with its 95 % interval.", "quality"),
        *([column("exact_match", "exact match", "Mean over the seeds.", "quality")] if answers else []),
        column("last_held_out", "held-out loss", "At the end, mean over the seeds.", "quality", "{:.4f}".format, True),
        column("size", "size", "The setting that was chosen to meet the budget of parameters.", "quality"),
        column("parameters", "adapter parameters", "The trainable ones, and how far off the budget.", "quality"),
        column("rate", "learning rate", "The one with the best held-out figure on the first seed.", "quality"),
        *_speed_columns(ranking, speed),
        column("step_ms", "step ms", "Median time of a training step.", "cost", words.milliseconds, True),
        column("peak_mib", "peak MiB", f"Highest {peak_of} of a run.", "cost", whole, True),
        column("above_model_mib", "above model MiB", above, "cost", whole, True),
        column("startup_s", "start-up s", "Making the adapter, SVDs included.", "cost", "{:.2f}".format, True),
        column("adapter_bytes", "adapter MiB", "The adapter's file.", "cost", words.mebibytes),
        column("grad_norm_first", "first gradient", "Its norm in the first step.", "cost", "{:.3g}".format),
    )


def _speed_columns(ranking: Ranking, speed: Speeds | None) -> tuple[TableColumn, ...]:
    if speed is None:
        return ()
    name, part, column = ranking.results.label(speed.reference), "speed", TableColumn
    of = f"the held-out loss with which {name} ends, {speed.loss:.4f}, with the 95 % interval"
    return (
        column("steps", f"steps to {name}'s loss", f"Steps to {of}.", part),
        column("seconds", f"s to {name}'s loss", f"Seconds of training, with start-up, to {of}.", part),
        column("lead", "lead on the way", f"How far its curve was below {name}'s, as a mean over the run.", part),
        column(
            "leeway", "rate / 3, rate x 3", "What they would add to the last held-out loss, on the first seed.", part
        ),
    )


def _cells(ranking: Ranking, method: MethodRow, speeds: Speeds | None) -> dict[str, TableCell]:
    """The cells that are not a mean over the runs."""
    results, key = ranking.results, method.method
    cells = {"method": TableCell(results.label(key)), "size": TableCell(method.size)}
    if method.chosen is not None:
        edge = " (edge)" if method.at_edge and len(method.learning_rates) > 1 else ""
        cells["rate"] = TableCell(words.rate(method.chosen) + edge, method.chosen)
    if method.adapter_parameters is not None:
        off = f"{100 * (method.off_budget or 0):+.1f}"
        beside = "" if float(off) == 0 else f" ({off.replace('-', words.MINUS)} %)"
        cells["parameters"] = TableCell(f"{method.adapter_parameters:,}{beside}", method.adapter_parameters)
    if estimate := ranking.estimates.get(key):
        cells["test"] = TableCell(words.estimate(results.header, estimate), estimate.mean, ranking.winner == key)
    elif results.counted(key):
        cells["test"] = TableCell("not finite")
    answered = [value for run in results.counted(key) if (value := (run.test or {}).get("exact_match")) is not None]
    if answered:
        cells["exact_match"] = TableCell(f"{100 * fmean(answered):.1f} %", fmean(answered))
    if speeds is not None and (speed := speeds.methods.get(key)):
        for name, until in (("steps", speed.steps), ("seconds", speed.seconds)):
            cells[name] = TableCell(words.until(until), None if until.mean == NEVER else until.mean)
        if speed.lead is not None:
            cells["lead"] = TableCell(words.loss_lead(speed.lead), speed.lead.mean)
        added = (words.NOTHING if value is None else f"{value:+.3f}" for value in (speed.third, speed.triple))
        cells["leeway"] = TableCell(", ".join(added).replace("-", words.MINUS))
    return cells


def _surely_lowest(ranking: Ranking, name: str) -> str | None:
    """The candidate whose worst seed beats every other candidate's best seed; nothing is sure with one seed."""
    spreads = {key: spread(ranking.results, key, name) for key in ranking.ranked}
    ends = sorted((figure.high, figure.low, key) for key, figure in spreads.items() if figure is not None)
    seeds = min((len(ranking.estimates[key].seeds) for key in ranking.ranked), default=0)
    return ends[0][2] if len(ends) > 1 and seeds > 1 and all(ends[0][0] < low for _, low, _ in ends[1:]) else None


def _group(ranking: Ranking, method: MethodRow) -> str:
    if method.status == "failed":
        return "failed"
    if method.bound or not method.matched:
        return "bound" if method.bound else "unmatched"
    if method.method in ranking.tied:
        return "tied"
    return "matched" if method.method in ranking.ranked else "unfinished"


def _note(ranking: Ranking, group: str) -> str:
    if group == "tied":
        return "best" if ranking.winner else "tied" if len(ranking.tied) > 1 else ""
    return {"matched": "", "unmatched": "not matched"}.get(group, group)


def markdown(table: ResultsTable) -> str:
    """The table in Markdown; best figures are bold where they are not tied."""
    lines = [[_escape(column.head) for column in table.columns]]
    lines.append(["---" if column.is_text else "---:" for column in table.columns])
    for row in table.rows:
        cells = [row.cells[column.key] for column in table.columns]
        texts = [f"**{_escape(cell.text)}**" if cell.best else _escape(cell.text) for cell in cells]
        lines.append([texts[0] + (f" ({row.note})" if row.note else ""), *texts[1:]])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escape(text: str) -> str:
    for letter in "\\|*_`<[":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("\n", " ")


def terminal(table: ResultsTable, name: str) -> Iterator[Table]:
    """Three tables for the terminal, which is narrow: what methods reached, how fast, and at what cost."""
    from rich.box import SIMPLE_HEAD
    from rich.text import Text

    from flashbone.errors import visible
    from flashbone.printing import Table

    titles = {"quality": "what the methods reached", "speed": "how fast they learned", "cost": "what they cost"}
    for part, title in titles.items():
        shown = Table(title=f"{name}: {title}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        shown.padding = (0, 1, 0, 0)
        columns = [column for column in table.columns if column.part in ("both", part)]
        if len(columns) == 1:
            continue
        for column in columns:
            shown.add_column(column.head, justify="left" if column.is_text else "right", overflow="fold")
        for row in table.rows:
            if part != "quality" and row.group in ("failed", "unfinished"):
                continue
            cells = [row.cells[column.key] for column in columns]
            texts = [Text(visible(cell.text), style="bold" if cell.best else "") for cell in cells]
            texts[0].append(f" ({row.note})" if row.note else "", style="dim")
            shown.add_row(*texts, style="dim" if row.group == "failed" else "")
        yield shown
