"""What methods cost and how far they came: means over the counted runs, mean curves, seconds to a common loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from flashbone.compare.report.results import ComparisonResults, LossCurve, RunRow
from flashbone.compare.report.statistics import Ranking


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


def spread(comparison: ComparisonResults, method: str, name: str) -> Spread | None:
    """A figure of the counted runs (a field of `Run`); None where no run has it."""
    values = [value for run in comparison.counted(method) if (value := getattr(run, name)) is not None]
    return Spread(fmean(values), min(values), max(values)) if values else None


def band(runs: Sequence[RunRow], name: str, points: int = 64) -> Band | None:
    """The curve `name` ("train" or "held_out") over runs; a training curve of more points is averaged in equal spans.

    A step at which a run's loss was not finite has no mean: the curve has a gap there.
    """
    curves = [curve for run in runs if (curve := getattr(run, name)) is not None]
    shared = sorted(set.intersection(*(set(curve.step) for curve in curves))) if curves else []
    if not shared:
        return None
    losses = [_at(curve, curve.loss, shared) for curve in curves]
    seconds = [_at(curve, curve.seconds, shared) for curve in curves]
    size = 1 if name == "held_out" else -(-len(shared) // points)
    spans = [range(start, min(start + size, len(shared))) for start in range(0, len(shared), size)]
    by_run = [[_mean([loss[i] for i in span]) for span in spans] for loss in losses]
    at_span = list(zip(*by_run, strict=True))
    return Band(
        tuple(shared[span[-1]] for span in spans),
        tuple(_mean([second[span[-1]] for second in seconds]) for span in spans),
        tuple(_mean(values) for values in at_span),
        tuple(_end(values, min) for values in at_span),
        tuple(_end(values, max) for values in at_span),
    )


def _at(curve: LossCurve, values: tuple[float | None, ...], steps: list[int]) -> list[float | None]:
    found = dict(zip(curve.step, values, strict=True))
    return [found[step] for step in steps]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _end(values: Sequence[float | None], choose) -> float | None:
    known = [value for value in values if value is not None]
    return choose(known) if len(known) == len(values) else None


def common_loss(ranking: Ranking) -> float | None:
    """The lowest held-out loss that each of the tied group reaches on its mean curve (with a sole winner: it and the
    next one), so that the best methods are timed over the same way; others may not reach it."""
    group = ranking.tied if len(ranking.tied) > 1 else ranking.ranked[:2]
    lowest = []
    for key in group:
        curve = band(ranking.comparison.counted(key), "held_out")
        losses = [loss for loss in curve.mean if loss is not None] if curve else []
        if losses:
            lowest.append(min(losses))
    return max(lowest) if lowest else None


def seconds_to(curve: Band, loss: float) -> float | None:
    """Seconds until a mean curve first is at or below a loss, on the straight line between two evaluations."""
    points = [(s, at) for s, at in zip(curve.seconds, curve.mean, strict=True) if s is not None and at is not None]
    for place, (second, at) in enumerate(points):
        if at <= loss:
            before, above = points[place - 1] if place else (second, at)
            return second if at == above else before + (second - before) * (above - loss) / (above - at)
    return None
