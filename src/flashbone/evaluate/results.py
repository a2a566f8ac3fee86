"""Figures with their intervals: as a table on stdout, as JSON, and in results.json."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashbone.evaluate.intervals import Interval
from flashbone.files.outputs import write_text


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: what it is, with its unit where it has one.
        value: the number.
        low: lower end of its interval of 95%; None where there is no interval.
        high: upper end.
        interval: how the interval was computed: "wilson", "bootstrap" or "stderr".
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    interval: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        kind: "task", "exact_match", "classification" or "perplexity".
        of: the task's name, or the file.
        rows: how many rows were scored.
        figures: the results.
        details: whatever else there is to say, such as a confusion matrix; goes into the JSON.
    """

    kind: str
    of: str
    rows: int
    figures: Sequence[Figure]
    details: dict[str, Any] = field(default_factory=dict)


def figure(name: str, value: float, interval: Interval | None = None, how: str | None = None) -> Figure:
    """A figure with the interval that was computed for it, if any."""
    low, high = interval if interval is not None else (None, None)
    return Figure(name, value, low, high, how if interval is not None else None)


def as_json(about: dict[str, Any], evaluations: Sequence[Evaluation]) -> str:
    """All of it as one JSON object; numbers that are not finite are null."""
    content = {**about, "evaluations": [asdict(evaluation) for evaluation in evaluations]}
    return json.dumps(finite(content), indent=2, ensure_ascii=False)


def write_results(folder: Path, about: dict[str, Any], evaluations: Sequence[Evaluation]) -> Path:
    """Write results.json, which appears whole; returns its path."""
    path = folder / "results.json"
    write_text(path, as_json(about, evaluations) + "\n")
    return path


def print_table(title: str, evaluations: Sequence[Evaluation]) -> None:
    """Print all figures on stdout, and of classifiers the score of each class."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    for name in ("of", "rows", "figure", "value", "95% interval"):
        table.add_column(name, justify="left" if name in ("of", "figure") else "right")
    for evaluation in evaluations:
        name = evaluation.of if evaluation.kind == "task" else Path(evaluation.of).name
        for number, one in enumerate(evaluation.figures):
            head = (name, f"{evaluation.rows:,}") if number == 0 else ("", "")
            table.add_row(*(Text(cell) for cell in (*head, one.name, shown(one.value), _range(one))))
    console = Console()
    console.print(table)
    for evaluation in evaluations:
        if "classes" in evaluation.details:
            console.print(_classes(evaluation.details))


def shown(value: float) -> str:
    """A number with four digits after the point, fewer where it is large."""
    return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def _range(one: Figure) -> str:
    return "" if one.low is None or one.high is None else f"{shown(one.low)} to {shown(one.high)}"


def _classes(details: dict[str, Any]) -> Any:
    """A row for each class: precision, recall, F1, and how its rows were classified."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="classes, and how often each (row) was taken for each (column)")
    numbers = [str(number) for number in range(1, len(details["classes"]) + 1)]
    for name in ("", "class", "rows", "precision", "recall", "F1", *numbers):
        table.add_column(name, justify="left" if name == "class" else "right")
    for number, entry, counts in zip(numbers, details["classes"], details["confusion"], strict=True):
        scores = ["" if entry[key] is None else f"{entry[key]:.3f}" for key in ("precision", "recall", "f1")]
        cells = (number, entry["label"], f"{entry['rows']:,}", *scores, *map(str, counts))
        table.add_row(*map(Text, cells))
    return table


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite, at any depth: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
