"""Intervals against published values, closed forms, and how often they hold the truth."""

import numpy as np
import pytest

from flashbone.evaluate.intervals import (
    bootstrap,
    bootstrap_ratio,
    from_stderr,
    resampled_ratios,
    resampled_rows,
    wilson,
)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
    ],
)
def test_wilson_gives_the_published_intervals(hits, total, low, high):
    assert wilson(hits, total) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_bootstrap_of_a_mean_is_the_normal_interval_of_many_rows():
    values = np.random.default_rng(3).normal(10, 2, size=2000)
    low, high = bootstrap_ratio(values, np.ones(2000))
    half = 1.96 * values.std() / np.sqrt(2000)
    assert (low, high) == (
        pytest.approx(values.mean() - half, abs=0.012),
        pytest.approx(values.mean() + half, abs=0.012),
    )


def test_bootstrap_of_a_ratio_draws_both_sums_from_the_same_rows():
    tokens = np.random.default_rng(1).integers(1, 100, size=50).astype(float)
    low, high = bootstrap_ratio(2.5 * tokens, tokens)
    assert (low, high) == (pytest.approx(2.5), pytest.approx(2.5))


def test_bootstrap_repeats_itself_and_has_nothing_to_say_of_one_row():
    values = np.arange(9.0)
    assert bootstrap(lambda drawn: values[drawn].mean(), 9) == bootstrap(lambda drawn: values[drawn].mean(), 9)
    assert bootstrap(lambda drawn: values[drawn].mean(), 9) != bootstrap(lambda drawn: values[drawn].mean(), 9, seed=1)
    assert bootstrap(lambda drawn: 1.0, 1) is None


def test_the_size_of_a_chunk_does_not_change_the_rows_that_are_drawn():
    whole, parts = (np.concatenate([*resampled_rows(50, 500, chunk=chunk)]) for chunk in (10**7, 999))
    assert np.array_equal(whole, parts)


def test_a_draw_without_any_weight_gets_the_ratio_of_all_rows():
    ratios = resampled_ratios(np.array([[3.0, 0.0]]), np.array([[2.0, 0.0]]), 100)
    assert np.array_equal(ratios, np.full((1, 100), 1.5))


def test_wilson_holds_the_truth_in_about_95_of_100_cases():
    hits = np.random.default_rng(0).binomial(40, 0.1, size=4000)
    held = np.mean([low <= 0.1 <= high for low, high in (wilson(int(n), 40) for n in hits)])
    assert 0.92 < held < 0.98


def test_a_standard_error_becomes_a_normal_interval():
    assert from_stderr(0.5, 0.1) == (pytest.approx(0.30400, abs=1e-5), pytest.approx(0.69600, abs=1e-5))
