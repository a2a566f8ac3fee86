"""Paired bootstrap over seeds and test rows: how sure a figure, or a difference of two methods, is.

A run's figure is sum(scores) / sum(weights) over the rows of the test set; a method's is the mean over its seeds. Rows
and seeds are drawn anew with replacement, the same ones for every method (pairs), each independently of the other
(Owen 2007, "The pigeonhole bootstrap"), and the deviations of both are added up.

A handful of seeds gives draws that are too narrow. So deviations of seeds are multiplied by sqrt(n / (n - 1)), which
makes their variance unbiased, and all draws by t(.975; v) / z(.975), v being Satterthwaite's degrees of freedom (1946).
Only that part of the spread between seeds counts as uncertain there which the luck of single runs with the rows, known
from the draws of rows, does not explain: where seeds themselves decide, the interval becomes Student's t-interval;
where rows do, it is the plain bootstrap. tests/compare/report/test_statistics.py has rates of false winners.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashbone.compare.report.results import Comparison

if TYPE_CHECKING:
    import numpy as np

DRAWS = 10_000
ROW_SEED, SEED_SEED = 0, 1  # of the generators
CHUNK = 2_000_000  # drawn rows held at a time
# Quantile .975 of Student's t over 1 / degrees of freedom; between them a straight line, which is never below.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 15: 2.131, 30: 2.042, 60: 2.0}
Z_QUANTILE = 1.96


@dataclass(frozen=True)
class Estimate:
    """A method's figure on the test set, in the metric's unit; no interval where there was nothing to draw from."""

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    drawn: str  # "seeds and rows", "rows", "seeds" or "nothing"


@dataclass(frozen=True)
class Difference:
    """How much better the first method is than the second (positive: better, whichever way the metric goes)."""

    first: str
    second: str
    mean: float
    low: float | None
    high: float | None
    share_better: float | None  # of draws in which the first is better; equal ones count half
    seeds: tuple[int, ...]  # which both have
    drawn: str

    @property
    def tied(self) -> bool:
        """Whether the 95 % interval includes 0, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


class Bootstrap:
    """The draws of one comparison: rows are drawn once for all runs, seeds once for each set of seeds."""

    def __init__(self, comparison: Comparison, draws: int = DRAWS) -> None:
        self.draws = draws
        metric = comparison.header.metric
        self.sign = 1 if comparison.header.higher_is_better else -1
        self.highest = math.inf if metric == "loss" else 1.0
        runs = [run for method in comparison.methods for run in comparison.counted(method.method)]
        self.figures: dict[str, dict[int, float]] = {}
        for run in runs:
            if (figure := run.figure(metric)) is not None:
                self.figures.setdefault(run.method, {})[run.seed] = figure
        scored = {(run.method, run.seed): run.scored for run in runs if run.scored is not None}
        drawn = draw_rows([s for s, _ in scored.values()], [w for _, w in scored.values()], draws)
        self._rows = dict(zip(scored, drawn, strict=True))

    def estimate(self, method: str) -> Estimate | None:
        """A method's mean over its own seeds; None without a figure."""
        seeds = tuple(sorted(self.figures.get(method, ())))
        if not seeds:
            return None
        points, rows, drawn = self._drawn([method], seeds)
        mean = float(points[0].mean())
        if drawn == "nothing":
            return Estimate(mean, None, None, seeds, drawn)
        low, high = _interval(widened(points[0], rows[0], self._counts(len(seeds))))
        return Estimate(mean, max(low, 0.0), min(high, self.highest), seeds, drawn)

    def difference(self, first: str, second: str) -> Difference | None:
        """The paired difference on the seeds that both methods have; None if there are none."""
        seeds = tuple(sorted(self.figures.get(first, {}).keys() & self.figures.get(second, {}).keys()))
        if not seeds:
            return None
        points, rows, drawn = self._drawn([first, second], seeds)
        point, row = self.sign * (points[0] - points[1]), self.sign * (rows[0] - rows[1])
        if drawn == "nothing":
            return Difference(first, second, float(point.mean()), None, None, None, seeds, drawn)
        values = widened(point, row, self._counts(len(seeds)))
        share = float((values > 0).mean() + 0.5 * (values == 0).mean())
        return Difference(first, second, float(point.mean()), *_interval(values), share, seeds, drawn)

    def _counts(self, seeds: int) -> np.ndarray:
        return draw_seeds(seeds, self.draws)

    def _drawn(self, methods: list[str], seeds: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, str]:
        """Figures (methods, seeds), drawn ones (methods, seeds, draws), and what was drawn; rows only where all of
        the runs have scores."""
        import numpy as np

        points = np.array([[self.figures[method][seed] for seed in seeds] for method in methods])
        with_rows = all((method, seed) in self._rows for method in methods for seed in seeds)
        if with_rows:
            rows = np.array([[self._rows[method, seed] for seed in seeds] for method in methods])
        else:
            rows = np.broadcast_to(points[:, :, None], (*points.shape, self.draws))
        drawn = [name for name, there in (("seeds", len(seeds) > 1), ("rows", with_rows)) if there]
        return points, rows, " and ".join(drawn) or "nothing"


def draw_rows(
    scores: list[tuple[float, ...]], weights: list[tuple[float, ...]], draws: int, chunk: int = CHUNK
) -> np.ndarray:
    """Figures (runs, draws) on test sets drawn anew with replacement, the same rows for all runs.

    Rows are drawn for `chunk` rows at a time, so memory does not grow with the test set.
    """
    import numpy as np

    if not scores:
        return np.empty((0, draws))
    above, below = np.array(scores).T, np.array(weights).T  # rows, runs
    rows, generator, parts = len(above), np.random.default_rng(ROW_SEED), []
    for start in range(0, draws, size := max(1, chunk // rows)):
        count = min(size, draws - start)
        chosen = generator.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        times = np.bincount(chosen.ravel(), minlength=count * rows).reshape(count, rows).astype(float)
        total = times @ below
        # A draw without any weight has no figure; the whole set's stands for it.
        parts.append(np.where(total > 0, times @ above / np.where(total > 0, total, 1), above.sum(0) / below.sum(0)))
    return np.concatenate(parts).T


def draw_seeds(seeds: int, draws: int) -> np.ndarray:
    """How often each seed was drawn, (seeds, draws): always the same for the same numbers."""
    import numpy as np

    return np.random.default_rng(SEED_SEED).multinomial(seeds, np.full(seeds, 1 / seeds), draws).T


def widened(points: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Draws of the mean over seeds, (draws,): rows and seeds drawn anew, widened for few seeds as the file's head says.

    `points` (seeds,) are the figures themselves, `rows` (seeds, draws) those on drawn rows, `counts` (seeds, draws)
    how often each seed was drawn.
    """
    seeds = len(points)
    by_rows = rows.mean(0)
    spread = float(points.var(ddof=1)) if seeds > 1 else 0.0
    if spread <= 1e-30:
        return by_rows
    by_seeds = math.sqrt(seeds / (seeds - 1)) * ((counts - 1) / seeds * points[:, None]).sum(0)
    explained = float((rows - by_rows).var(1).sum()) / (seeds - 1)  # of the spread: single runs' luck with the rows
    of_rows, of_seeds, beyond = float(by_rows.var()), spread / seeds, max(0.0, spread - explained) / seeds
    if beyond <= 1e-9 * of_seeds:
        return by_rows + by_seeds
    freedom = (seeds - 1) * ((of_seeds + of_rows) / beyond) ** 2
    mean = points.mean()
    return mean + t_quantile(freedom) / Z_QUANTILE * (by_rows + by_seeds - mean)


def t_quantile(freedom: float) -> float:
    """Student's .975 quantile, at most a few percent too large between whole degrees of freedom."""
    import numpy as np

    freedoms = [math.inf, *sorted(T_QUANTILES, reverse=True)]
    return float(np.interp(1 / freedom, [1 / f for f in freedoms], [T_QUANTILES.get(f, Z_QUANTILE) for f in freedoms]))


def _interval(draws: np.ndarray) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)
