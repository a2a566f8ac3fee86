"""Confidence intervals of 95%: how far a figure may be off because it was measured on so few rows."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Interval = tuple[float, float]

Z = 1.959963984540054  # 95% of a normal distribution lie within so many standard deviations
RESAMPLES = 1000
CHUNK = 2_000_000  # row numbers held at a time


def wilson(hits: int, total: int) -> Interval:
    """Wilson's score interval of a share, which stays within 0 and 1 and is right for few rows, too.

    Args:
        hits: Rows that count, at most `total`.
        total: All rows, one or more.
    """
    assert 0 <= hits <= total, "hits are among the rows"
    assert total > 0, "a share needs rows"
    share = hits / total
    centre = share + Z**2 / (2 * total)
    half = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    scale = 1 + Z**2 / total
    low, high = (centre - half) / scale, (centre + half) / scale
    return (0.0 if hits == 0 else low), (1.0 if hits == total else high)  # where rounding would miss them


def bootstrap(statistic: Callable[[np.ndarray], float], rows: int, seed: int = 0) -> Interval | None:
    """The percentile interval of a figure over resampled rows; None of a single row.

    Args:
        statistic: The figure of the rows with these numbers, int64 of shape (rows,), in which some occur twice.
        rows: How many there are.
        seed: The same seed gives the same interval.
    """
    if rows < 2:
        return None
    return percentiles([statistic(drawn) for part in resampled_rows(rows, RESAMPLES, seed) for drawn in part])


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray, seed: int = 0) -> Interval | None:
    """The bootstrap interval of a sum over rows divided by another one, such as the loss of all tokens by their number.

    Args:
        numerators: One number a row, of shape (rows,).
        denominators: As many.
        seed: As for `bootstrap`.
    """
    if len(numerators) < 2:
        return None
    return percentiles(resampled_ratios(numerators[None], denominators[None], RESAMPLES, seed))


def resampled_rows(rows: int, draws: int, seed: int = 0, chunk: int = CHUNK) -> Iterator[np.ndarray]:
    """Row numbers drawn with replacement, in arrays of (some of the draws, rows) and at most `chunk` numbers, so that
    memory does not grow with the draws. The chunk does not change the numbers."""
    generator, at_once = np.random.default_rng(seed), max(1, chunk // rows)
    for start in range(0, draws, at_once):
        yield generator.integers(0, rows, (min(at_once, draws - start), rows))


def resampled_ratios(
    numerators: np.ndarray, denominators: np.ndarray, draws: int, seed: int = 0, chunk: int = CHUNK
) -> np.ndarray:
    """sum(numerators) / sum(denominators) on resampled rows, the same rows for each of several series.

    Args:
        numerators: Of shape (series, rows).
        denominators: Of the same shape. Where all that are drawn are zero, the ratio is that of all rows.
        draws: How often rows are drawn.
        seed: The same seed gives the same ratios.
        chunk: As for `resampled_rows`.

    Returns:
        The ratios, of shape (series, draws).
    """
    if not len(numerators):
        return np.empty((0, draws))
    above, below, parts = numerators.T, denominators.T, []
    for drawn in resampled_rows(len(above), draws, seed, chunk):
        count, rows = drawn.shape
        numbers = (drawn + rows * np.arange(count)[:, None]).ravel()
        times = np.bincount(numbers, minlength=count * rows).reshape(count, rows).astype(float)
        total = times @ below
        parts.append(np.where(total > 0, times @ above / np.where(total > 0, total, 1), above.sum(0) / below.sum(0)))
    return np.concatenate(parts).T


def percentiles(figures: Sequence[float] | np.ndarray) -> Interval:
    """The interval that holds the middle 95% of resampled figures."""
    low, high = np.quantile(figures, (0.025, 0.975))
    return float(low), float(high)


def from_stderr(value: float, stderr: float) -> Interval:
    """The normal interval of a figure, from its standard error."""
    return value - Z * stderr, value + Z * stderr
