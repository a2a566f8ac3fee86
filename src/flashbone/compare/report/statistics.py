"""How sure figures and differences are: a paired bootstrap over seeds and rows.

A run's figure is sum(scores) / sum(weights) over the rows of the test set; a method's is the mean over its seeds. Rows
and seeds are resampled with replacement, independently of each other (Owen 2007, "The pigeonhole bootstrap"), the same
ones for every method (pairs), and the deviations of both are added up.

With a handful of seeds such draws are too narrow. So deviations of seeds are multiplied by sqrt(n / (n - 1)), which
makes their variance unbiased, and all draws by t(.975; v) / z(.975), where v are Satterthwaite's degrees of freedom
(1946). In v, only the part of the spread between seeds that resampled rows do not explain counts as uncertain. Where
seeds decide, the interval becomes Student's t-interval; where rows decide, it stays the plain bootstrap.
tests/compare/report/test_statistics.py measures how often a false winner is named.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flashbone.compare.results import ComparisonResults
from flashbone.evaluate.intervals import Z, percentiles, resampled_ratios

DRAWS = 10_000
ROW_SEED, SEED_SEED = 0, 1  # of the generators


@dataclass(frozen=True)
class Estimate:
    """A method's figure on the test set, in the metric's unit; no interval where nothing could be resampled."""

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    resampled: str  # "seeds and rows", "rows", "seeds" or "nothing"


@dataclass(frozen=True)
class Difference:
    """How much better the first method is than the second: positive is better, whichever way the metric goes."""

    mean: float
    low: float | None
    high: float | None
    share_better: float | None  # of draws in which the first is better; equal ones count half
    seeds: tuple[int, ...]  # those that both have
    resampled: str

    @property
    def tied(self) -> bool:
        """Whether the 95 % interval includes 0, or does not exist."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


class Bootstrap:
    """The draws of one comparison: rows are resampled once for all runs, seeds once for each number of seeds."""

    def __init__(self, results: ComparisonResults, draws: int = DRAWS) -> None:
        self.draws = draws
        metric = results.header.metric
        self.sign = 1 if results.header.higher_is_better else -1
        self.highest = math.inf if metric == "loss" else 1.0
        runs = [run for method in results.methods for run in results.counted(method.method)]
        self.figures: dict[str, dict[int, float]] = {}
        for run in runs:
            if (figure := run.figure(metric)) is not None:
                self.figures.setdefault(run.method, {})[run.seed] = figure
        scored = {(run.method, run.seed): scores for run in runs if (scores := run.resampled_scores) is not None}
        scores, weights = (np.array([pair[i] for pair in scored.values()]) for i in (0, 1))
        self._rows = dict(zip(scored, resampled_ratios(scores, weights, draws, ROW_SEED), strict=True))

    def estimate(self, method: str) -> Estimate | None:
        """A method's mean over its seeds; None without a figure."""
        seeds = tuple(sorted(self.figures.get(method, ())))
        if not seeds:
            return None
        points, rows, resampled = self._resampled([method], seeds)
        mean = float(points[0].mean())
        if resampled == "nothing":
            return Estimate(mean, None, None, seeds, resampled)
        low, high = percentiles(widened(points[0], rows[0], resampled_seeds(len(seeds), self.draws)))
        return Estimate(mean, max(low, 0.0), min(high, self.highest), seeds, resampled)

    def difference(self, first: str, second: str) -> Difference | None:
        """The paired difference on the seeds that both methods have; None if there are none."""
        seeds = tuple(sorted(self.figures.get(first, {}).keys() & self.figures.get(second, {}).keys()))
        if not seeds:
            return None
        points, rows, resampled = self._resampled([first, second], seeds)
        point, row = self.sign * (points[0] - points[1]), self.sign * (rows[0] - rows[1])
        if resampled == "nothing":
            return Difference(float(point.mean()), None, None, None, seeds, resampled)
        values = widened(point, row, resampled_seeds(len(seeds), self.draws))
        share = float((values > 0).mean() + 0.5 * (values == 0).mean())
        return Difference(float(point.mean()), *percentiles(values), share, seeds, resampled)

    def _resampled(self, methods: list[str], seeds: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, str]:
        """Figures (methods, seeds), those on resampled rows (methods, seeds, draws), and what was resampled: rows only
        where all of the runs have scores."""
        points = np.array([[self.figures[method][seed] for seed in seeds] for method in methods])
        with_rows = all((method, seed) in self._rows for method in methods for seed in seeds)
        if with_rows:
            rows = np.array([[self._rows[method, seed] for seed in seeds] for method in methods])
        else:
            rows = np.broadcast_to(points[:, :, None], (*points.shape, self.draws))
        resampled = [name for name, is_so in (("seeds", len(seeds) > 1), ("rows", with_rows)) if is_so]
        return points, rows, " and ".join(resampled) or "nothing"


def resampled_seeds(seeds: int, draws: int) -> np.ndarray:
    """How often each seed was drawn, (seeds, draws); equal arguments give equal counts."""
    return np.random.default_rng(SEED_SEED).multinomial(seeds, np.full(seeds, 1 / seeds), draws).T


def widened(points: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Draws of the mean over seeds, (draws,): rows and seeds resampled, widened for few seeds as the file's head says.

    `points` (seeds,) are the figures themselves, `rows` (seeds, draws) those on resampled rows, `counts` (seeds, draws)
    how often each seed was drawn.
    """
    seeds = len(points)
    by_rows = rows.mean(0)
    spread = float(points.var(ddof=1)) if seeds > 1 else 0.0
    if spread <= 1e-30:
        return by_rows
    by_seeds = math.sqrt(seeds / (seeds - 1)) * ((counts - 1) / seeds * points[:, None]).sum(0)
    explained = float((rows - by_rows).var(1).sum()) / (seeds - 1)  # the part of the spread that rows explain
    of_rows, of_seeds, beyond = float(by_rows.var()), spread / seeds, max(0.0, spread - explained) / seeds
    if beyond <= 1e-9 * of_seeds:
        return by_rows + by_seeds
    freedom = (seeds - 1) * ((of_seeds + of_rows) / beyond) ** 2
    mean = points.mean()
    return mean + widening(freedom) * (by_rows + by_seeds - mean)


def widening(freedom: float) -> float:
    """Student's .975 quantile by the normal one."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975)) / Z
