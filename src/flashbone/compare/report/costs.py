"""What methods cost and how they learned: means over the counted runs, mean curves, losses by learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from flashbone.compare.results import ComparisonResults, LossCurve, RunRow


@dataclass(frozen=True)
class Spread:
    """A mean over runs with its smallest and largest value."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Band:
    """Mean over runs with the range between them, at the steps that all of them have."""

    step: tuple[int, ...]
    seconds: tuple[float | None, ...]
    mean: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


def spread(results: ComparisonResults, method: str, name: str) -> Spread | None:
    """A figure of the counted runs (a field of `RunRow`); None where no run has it."""
    values = [value for run in results.counted(method) if (value := getattr(run, name)) is not None]
    return Spread(fmean(values), min(values), max(values)) if values else None


def band(runs: Sequence[RunRow], name: str, points: int = 64) -> Band | None:
    """The curve `name` ("train" or "held_out") over runs; a training curve of more points is averaged in equal spans.

    A step at which a run's loss was not finite has no mean: the curve has a gap there.
    """
    curves: list[LossCurve] = [curve for run in runs if (curve := getattr(run, name)) is not None]
    steps = sorted(set.intersection(*(set(curve.step) for curve in curves))) if curves else []
    if not steps:
        return None
    size = 1 if name == "held_out" else -(-len(steps) // points)
    spans = [steps[start : start + size] for start in range(0, len(steps), size)]
    losses = [dict(zip(curve.step, curve.loss, strict=True)) for curve in curves]
    seconds = [dict(zip(curve.step, curve.seconds, strict=True)) for curve in curves]
    means = [[_of_all(fmean, [loss[step] for step in span]) for loss in losses] for span in spans]  # of each run
    return Band(
        tuple(span[-1] for span in spans),
        tuple(_of_all(fmean, [second[span[-1]] for second in seconds]) for span in spans),
        tuple(_of_all(fmean, at) for at in means),
        tuple(_of_all(min, at) for at in means),
        tuple(_of_all(max, at) for at in means),
    )


def _of_all(choose: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    """A mean, minimum or maximum; None where a value is missing."""
    finite = [value for value in values if value is not None]
    return choose(finite) if finite and len(finite) == len(values) else None


def sweep(results: ComparisonResults, method: str) -> list[tuple[float, float]]:
    """Learning rates with the held-out loss at the end, on the first seed, with which all rates were tried."""
    first = results.header.seeds[0] if results.header.seeds else None
    runs = [run for run in results.runs if run.method == method and run.status == "ok" and run.seed == first]
    points = [(run.learning_rate, run.last_held_out) for run in runs]
    return sorted((rate, loss) for rate, loss in points if rate is not None and loss is not None)
