"""How figures of a comparison are written, in sentences and in tables alike."""

from __future__ import annotations

from collections.abc import Callable

from flashbone.compare.report.speed import NEVER, Until
from flashbone.compare.report.statistics import Difference, Estimate
from flashbone.compare.results import ComparisonResults, HeaderRow

METRICS = {"accuracy": "accuracy", "exact_match": "exact match", "loss": "loss"}
NOTHING, MINUS = "\u2013", "\u2212"  # a dash, and a minus sign as wide as a plus


def metric(header: HeaderRow) -> str:
    """The name of the test metric."""
    return METRICS[header.metric]


def figure(header: HeaderRow, value: float) -> str:
    """`93.4 %`, or a loss to four digits behind the point."""
    return f"{value:.4f}" if header.metric == "loss" else f"{100 * value:.1f} %"


def estimate(header: HeaderRow, value: Estimate) -> str:
    """`93.4 % (91.0 to 95.2)`."""
    if value.low is None or value.high is None:
        return figure(header, value.mean)
    low, high = (figure(header, end).removesuffix(" %") for end in (value.low, value.high))
    return f"{figure(header, value.mean)} ({low} to {high})"


def lead(header: HeaderRow, value: Difference) -> str:
    """`2.1 points (0.3 to 3.9)`: how much better the first is, with the 95 % interval."""

    if header.metric == "loss":
        return loss_lead(value)

    def number(end: float) -> str:
        return f"{100 * end:.1f}".replace("-", MINUS)

    return _with_interval(number(value.mean) + " points", value, number)


def loss_lead(value: Difference) -> str:
    """`0.0143 (−0.0384 to 0.0752)`: by how much a loss is lower."""

    def number(end: float) -> str:
        return f"{end:.4f}".replace("-", MINUS)

    return _with_interval(number(value.mean), value, number)


def until(value: Until) -> str:
    """`31 (24 to never)`: steps or seconds to a loss."""

    def number(end: float) -> str:
        return "never" if end == NEVER else f"{end:,.0f}"

    return "never" if value.low == value.high == NEVER else _with_interval(number(value.mean), value, number)


def _with_interval(mean: str, value: Difference | Until, number: Callable[[float], str]) -> str:
    return mean if value.low is None or value.high is None else f"{mean} ({number(value.low)} to {number(value.high)})"


def share(value: float) -> str:
    """`99 %`, and never 100 %: draws are finite."""
    return "over 99.9 %" if value > 0.999 else f"{100 * value:.1f} %" if value > 0.99 else f"{100 * value:.0f} %"


def names(results: ComparisonResults, keys: tuple[str, ...] | list[str]) -> str:
    """`A, B and C`."""
    labels = [results.label(key) for key in keys]
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 method`, `2 methods`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def rate(value: float) -> str:
    """A learning rate: `0.003`, `3e-05`."""
    return f"{value:.4g}"


def milliseconds(value: float) -> str:
    """Three digits: `480`, `48.2`, `4.82`."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def mebibytes(value: float) -> str:
    """Bytes in MiB."""
    return f"{value / 2**20:,.2f}"
