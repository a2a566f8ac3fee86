"""How fast methods learn: steps to the loss that a reference ends with, the lead on the way, and the rate's leeway.

In every draw of the bootstrap (statistics.py; here of held-out rows) the gap between a method and that loss is drawn at
each evaluation, with the same seeds and rows for both. The step at which it closes lies on the line between two
evaluations. Where it never closes the draw counts as infinitely many steps, so an interval may end with "never".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flashbone.compare.report.costs import sweep
from flashbone.compare.report.statistics import DRAWS, ROW_SEED, Difference, resampled_seeds, widened
from flashbone.compare.results import FEWEST_ROWS, ComparisonResults, RunRow
from flashbone.evaluate.intervals import percentiles, resampled_ratios

NEVER = math.inf


@dataclass(frozen=True)
class Until:
    """Steps or seconds to a loss, and their 95 % interval: `NEVER` where it is not reached; None without one."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Speed:
    """How fast a method learns.

    Attributes:
        steps, seconds: Until the mean curve is at the loss that the reference ends with. Seconds are those of the
            method's mean pace; its noise is not in their interval.
        lead: By how much the held-out loss was below the reference's, as a mean over the run: the area between the
            curves. None of the reference.
        third, triple: What is added to the last held-out loss by a third and by three times the chosen rate, on the
            first seed and the line between the rates tried; None beyond them.
    """

    steps: Until
    seconds: Until
    lead: Difference | None
    third: float | None
    triple: float | None


@dataclass(frozen=True)
class Speeds:
    """The speeds of all methods that ran on the reference's seeds, by their keys.

    Attributes:
        reference: LoRA, or without it the best method.
        loss: the held-out loss that it ends with.
        end: its last step.
    """

    reference: str
    loss: float
    end: int
    methods: dict[str, Speed]


@dataclass(frozen=True)
class _Curves:
    """Held-out losses of a method's runs, (seeds, steps), and on resampled rows, (seeds, steps, draws)."""

    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    points: np.ndarray
    rows: np.ndarray
    has_rows: bool
    seconds: np.ndarray  # (steps,), means


def speeds(results: ComparisonResults, reference: str, draws: int = DRAWS) -> Speeds | None:
    """The speeds of a comparison's methods; None where the reference has no curve."""
    target, made = _curves(results.counted(reference), draws), {}
    if target is None:
        return None
    for method in results.methods:
        key = method.method
        curves = target if key == reference else _curves(results.counted(key), draws)
        if curves and (curves.seeds, curves.steps) == (target.seeds, target.steps):
            lead = None if key == reference else _lead(curves, target)
            made[key] = Speed(*_until(curves, target), lead, *_leeway(results, key, method.chosen))
    return Speeds(reference, float(target.points[:, -1].mean()), target.steps[-1], made)


def _curves(runs: list[RunRow], draws: int) -> _Curves | None:
    """None where a run has no curve, or a loss that is not finite."""
    curves = [run.held_out for run in runs if run.held_out is not None and None not in run.held_out.loss]
    if not curves or len(curves) < len(runs) or len(curves[0].step) < 2 or len({curve.step for curve in curves}) > 1:
        return None
    seconds = np.array([[math.nan if s is None else s for s in curve.seconds] for curve in curves]).mean(0)
    points = np.array([curve.loss for curve in curves], float)
    has_rows = all(len(curve.weights or ()) >= FEWEST_ROWS for curve in curves)
    rows = np.broadcast_to(points[:, :, None], (*points.shape, draws))
    if has_rows:
        sums = np.array([curve.rows for curve in curves]).reshape(points.size, -1)
        weights = np.repeat(np.array([curve.weights for curve in curves], float), points.shape[1], 0)
        points = (sums.sum(1) / weights.sum(1)).reshape(points.shape)
        rows = resampled_ratios(sums, weights, draws, ROW_SEED).reshape(rows.shape)
    return _Curves(tuple(run.seed for run in runs), curves[0].step, points, rows, has_rows, seconds)


def _until(curves: _Curves, target: _Curves) -> tuple[Until, Until]:
    points, rows = curves.points - target.points[:, -1:], curves.rows - target.rows[:, -1:]
    mean = float(_closing(points.mean(0)[:, None], curves.steps)[0])
    ends: list[float | None] = [None, None]
    if _resampled(curves, target) != "nothing":
        counts = resampled_seeds(len(curves.seeds), rows.shape[-1])
        drawn = [widened(points[:, at], rows[:, at], counts) for at in range(len(curves.steps))]
        # By rank: no number lies between the last step and never.
        steps = np.quantile(_closing(np.array(drawn), curves.steps), (0.025, 0.975), method="inverted_cdf")
        ends = [float(step) for step in steps]

    def second(step: float | None) -> float | None:
        return step if step is None or step == NEVER else float(np.interp(step, curves.steps, curves.seconds))

    return Until(mean, *ends), Until(second(mean) or 0.0, *map(second, ends))


def _closing(gaps: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
    """The steps at which gaps, (steps, draws), first are 0 or less."""
    closed, draws = gaps <= 0, np.arange(gaps.shape[1])
    first = closed.argmax(0)
    before = np.maximum(first - 1, 0)
    above, below, at = gaps[before, draws], gaps[first, draws], np.array(steps, float)
    share = np.where(first > 0, above / np.where(above > below, above - below, 1), 0)
    return np.where(closed.any(0), at[before] + (at[first] - at[before]) * share, NEVER)


def _lead(curves: _Curves, target: _Curves) -> Difference:
    span = np.diff(curves.steps) / (curves.steps[-1] - curves.steps[0])
    weights = (np.append(span, 0) + np.append(0, span)) / 2  # of the trapezoids between the evaluations
    points = ((target.points - curves.points) * weights).sum(1)
    rows = ((target.rows - curves.rows) * weights[:, None]).sum(1)
    mean, resampled = float(points.mean()), _resampled(curves, target)
    if resampled == "nothing":
        return Difference(mean, None, None, None, curves.seeds, resampled)
    values = widened(points, rows, resampled_seeds(len(points), rows.shape[-1]))
    share = float((values > 0).mean() + 0.5 * (values == 0).mean())
    return Difference(mean, *percentiles(values), share, curves.seeds, resampled)


def _resampled(curves: _Curves, target: _Curves) -> str:
    what = {"seeds": len(curves.seeds) > 1, "rows": curves.has_rows and target.has_rows}
    return " and ".join(name for name, is_so in what.items() if is_so) or "nothing"


def _leeway(results: ComparisonResults, method: str, chosen: float | None) -> tuple[float | None, float | None]:
    tried = dict(sweep(results, method))
    if chosen not in tried:
        return None, None
    rates, losses = list(tried), list(tried.values())

    def added(factor: float) -> float | None:
        rate = chosen * factor
        if not rates[0] * (1 - 1e-9) <= rate <= rates[-1] * (1 + 1e-9):
            return None
        return float(np.interp(math.log(rate), np.log(rates), losses)) - tried[chosen]

    return added(1 / 3), added(3)
