"""Confidence intervals of 95%: how far a figure may be off because it was measured on so few rows."""

import math
from collections.abc import Callable

import numpy as np

Interval = tuple[float, float]

Z = 1.959963984540054  # 95% of a normal distribution lie within so many standard deviations
RESAMPLES = 1000


def wilson(hits: int, total: int) -> Interval:
    """Wilson's score interval of a share, which stays within 0 and 1 and is right for few rows, too.

    Args:
        hits: Rows that count, at most `total`.
        total: All rows, one or more.
    """
    assert 0 <= hits <= total, "a share is of what there is"
    assert total > 0, "of no rows there is no share"
    share = hits / total
    centre = share + Z**2 / (2 * total)
    half = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    scale = 1 + Z**2 / total
    low, high = (centre - half) / scale, (centre + half) / scale
    return (0.0 if hits == 0 else low), (1.0 if hits == total else high)  # where rounding would miss them


def bootstrap(statistic: Callable[[np.ndarray], float], rows: int, seed: int = 0) -> Interval | None:
    """The percentile interval of a figure over rows drawn again and again, with replacement; None of a single row.

    Args:
        statistic: The figure of the rows with these numbers, int64 of shape (rows,), in which some occur twice.
        rows: How many there are.
        seed: The same seed gives the same interval.
    """
    if rows < 2:
        return None
    random = np.random.default_rng(seed)
    figures = [statistic(random.integers(rows, size=rows)) for _ in range(RESAMPLES)]
    low, high = np.quantile(figures, (0.025, 0.975))
    return float(low), float(high)


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray, seed: int = 0) -> Interval | None:
    """The bootstrap interval of a sum over rows divided by another one, such as the loss of all tokens by their number.

    Args:
        numerators: One number a row, of shape (rows,).
        denominators: As many; the sum of any of them is not zero.
        seed: As for `bootstrap`.
    """
    return bootstrap(lambda drawn: float(numerators[drawn].sum() / denominators[drawn].sum()), len(numerators), seed)


def from_stderr(value: float, stderr: float) -> Interval:
    """The normal interval of a figure of which only the standard error is known."""
    return value - Z * stderr, value + Z * stderr
