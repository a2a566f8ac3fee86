"""Figures with their intervals: results.json, and a table on stdout."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashbone.evaluate.intervals import Interval
from flashbone.files.records import read_record

RESULTS = "results.json"


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: what it is, with its unit where it has one.
        value: the number; None where it is not finite.
        low: lower end of its interval of 95%; None where there is no interval.
        high: upper end.
        interval: how the interval was computed: "wilson", "bootstrap" or "stderr".
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    interval: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation.

    Attributes:
        kind: "task", "exact_match", "classification" or "perplexity".
        of: the task's name, or the file.
        rows: how many rows were scored.
        figures: the results.
        details: more results, such as a confusion matrix, for the JSON.
    """

    kind: str
    of: str
    rows: int
    figures: list[Figure]
    details: dict[str, Any] = field(default_factory=dict)


def figure(name: str, value: float, interval: Interval | None = None, how: str | None = None) -> Figure:
    """A figure with the interval that was computed for it, if any."""
    low, high = interval if interval is not None else (None, None)
    return Figure(name, value, low, high, how if interval is not None else None)


@dataclass(frozen=True)
class EvalResults:
    """The content of results.json: what was measured on which model, and the results.

    Attributes:
        merged: whether the adapter was put into the weights.
        limit: rows of each file or task; None for all.
        seconds: how long it took, loading included.
    """

    model: str
    adapter: str | None
    merged: bool
    dtype: str | None
    device: str | None
    limit: int | None
    versions: dict[str, str]
    seconds: float
    evaluations: list[Evaluation]


def read_results(folder: Path) -> EvalResults | None:
    """The results of an evaluation that ended; None if it has not.

    Raises:
        FormatError: results.json is broken.
    """
    file = folder / RESULTS
    return read_record(EvalResults, file, "delete it to repeat the evaluation") if file.exists() else None


def print_table(results: EvalResults) -> None:
    """Print all figures on stdout, and of classifiers the score of each class."""
    from flashbone.printing import Console, Table

    adapter = f" with {results.adapter}{', merged' if results.merged else ''}" if results.adapter else ""
    table = Table(title=f"{results.model}{adapter}")
    for name in ("of", "rows", "figure", "value", "95% interval"):
        table.add_column(name, justify="left" if name in ("of", "figure") else "right")
    for evaluation in results.evaluations:
        name = evaluation.of if evaluation.kind == "task" else Path(evaluation.of).name
        for number, figure in enumerate(evaluation.figures):
            head = (name, f"{evaluation.rows:,}") if number == 0 else ("", "")
            table.add_row(*head, figure.name, shown(figure.value), _range(figure))
    console = Console()
    console.print(table)
    for evaluation in results.evaluations:
        if "classes" in evaluation.details:
            console.print(_classes(evaluation.details))


def shown(value: float | None) -> str:
    """A number with four digits after the point, fewer where it is large."""
    if value is None:
        return "not finite"
    return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def _range(figure: Figure) -> str:
    return "" if figure.low is None or figure.high is None else f"{shown(figure.low)} to {shown(figure.high)}"


def _classes(details: dict[str, Any]) -> Any:
    """A row for each class: precision, recall, F1, and how its rows were classified."""
    from flashbone.printing import Table

    table = Table(title="classes, and how often each (row) was taken for each (column)")
    numbers = [str(number) for number in range(1, len(details["classes"]) + 1)]
    for name in ("", "class", "rows", "precision", "recall", "F1", *numbers):
        table.add_column(name, justify="left" if name == "class" else "right")
    for number, entry, counts in zip(numbers, details["classes"], details["confusion"], strict=True):
        scores = ["" if entry[key] is None else f"{entry[key]:.3f}" for key in ("precision", "recall", "f1")]
        table.add_row(number, entry["label"], f"{entry['rows']:,}", *scores, *map(str, counts))
    return table
