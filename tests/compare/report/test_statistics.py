"""The paired bootstrap: exact for what can be counted out, right in its rates of error, paired, and always the same."""

import itertools
import math

import comparison_rows as made
import numpy as np
import pytest

from flashbone.compare.reading import read_results
from flashbone.compare.report.ranking import rank
from flashbone.compare.report.statistics import Bootstrap, resampled_seeds, widened, widening
from flashbone.evaluate.intervals import resampled_ratios

pytestmark = pytest.mark.slow


def difference(tmp_path, scores, metric="accuracy", weights=None, draws=4000):
    """The paired difference of two methods with these scores (2, seeds, rows)."""
    seeds = tuple(range(scores.shape[1]))
    lines = [made.header(metric, seeds), made.method("a"), made.method("b")]
    for key, runs in zip("ab", scores, strict=True):
        for seed in seeds:
            lines.append(made.run(key, seed, runs[seed], metric=metric))
            if weights is not None:
                lines[-1]["test_weights"] = list(map(float, weights))
    return Bootstrap(read_results(made.write(tmp_path, lines)), draws).difference("a", "b")


def test_draws_of_rows_have_the_distribution_of_all_possible_draws():
    scores, weights = (3.0, 1.0, 4.0, 1.5), (1.0, 2.0, 1.0, 3.0)
    drawn = resampled_ratios(np.array([scores]), np.array([weights]), 40_000)[0]
    every = [
        sum(scores[i] for i in rows) / sum(weights[i] for i in rows) for rows in itertools.product(range(4), repeat=4)
    ]
    for value in sorted(set(every))[::4]:
        assert np.mean(drawn <= value + 1e-12) == pytest.approx(np.mean(np.array(every) <= value + 1e-12), abs=0.01)


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_draws_of_seeds_have_the_distribution_of_all_possible_draws(seeds):
    points = np.array([0.1, 0.4, -0.2, 0.9])[:seeds]
    drawn = widened(points, np.broadcast_to(points[:, None], (seeds, 40_000)), resampled_seeds(seeds, 40_000))
    means = np.array([points[list(chosen)].mean() for chosen in itertools.product(range(seeds), repeat=seeds)])
    # Without rows the widening is known: an unbiased variance, and Student's quantile with seeds - 1 degrees.
    factor = math.sqrt(seeds / (seeds - 1)) * widening(seeds - 1)
    every = points.mean() + factor * (means - points.mean())
    for value in np.unique(every)[:: max(1, len(np.unique(every)) // 8)]:
        assert np.mean(drawn <= value + 1e-9) == pytest.approx(np.mean(every <= value + 1e-9), abs=0.01)


def test_few_seeds_widen_by_students_quantile():
    assert [round(1.96 * widening(freedom), 2) for freedom in (1, 2, 3, 10, 1e12)] == [12.71, 4.30, 3.18, 2.23, 1.96]


def rates(simulate, seeds, rows=100, times=250):
    """How often the first and the second of two methods are taken for better."""
    generator, first, second = np.random.default_rng(7), 0, 0
    counts = resampled_seeds(seeds, 1000)
    for _ in range(times):
        a, b = simulate(generator, seeds, rows)
        drawn = resampled_ratios(np.concatenate([a, b]), np.ones((2 * seeds, rows)), 1000)
        low, high = np.quantile(widened((a - b).mean(1), drawn[:seeds] - drawn[seeds:], counts), (0.025, 0.975))
        first, second = first + (low > 0), second + (high < 0)
    return first / times, second / times


def answers(better, churn):
    return lambda generator, seeds, rows: made.right_or_wrong([better, 0], seeds, rows, 0.05, churn, generator)


def losses(better, by_seed, by_row):
    """Losses with an effect of the seed common to both, and of seed and row on each."""

    def simulate(generator, seeds, rows):
        both = generator.normal(0, 1, rows) + generator.normal(0, 0.5, (seeds, 1))
        each = generator.normal(0, by_seed, (2, seeds, 1)) + generator.normal(0, by_row, (2, 1, rows))
        noise = generator.normal(0, 0.05, (2, seeds, rows))
        return both + each + noise + np.array([better, 0.0])[:, None, None]

    return simulate


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    "simulate", [answers(0, 0.02), losses(0, 0.2, 0.01), losses(0, 0, 0.3), losses(0, 0.05, 0.3)],
    ids=["answers", "seeds decide", "rows decide", "both"],
)  # fmt: skip
def test_equal_methods_seldom_get_a_winner(simulate, seeds):
    assert sum(rates(simulate, seeds)) <= 0.1


def test_the_worst_known_rate_of_false_winners_stays_below_a_sixth():
    """Three seeds whose own spread is as large as what the rows explain: the guess of it is at its poorest."""
    assert sum(rates(answers(0, 0.1), 3)) <= 1 / 6


def test_a_true_difference_is_found():
    assert rates(answers(0.15, 0.02), 3)[0] >= 0.7
    assert rates(losses(0.1, 0.01, 0.05), 3)[0] >= 0.9


def test_a_seed_effect_common_to_both_methods_hides_no_difference(tmp_path):
    generator = np.random.default_rng(1)
    base = generator.normal(2, 0.3, 200) + np.array([[-0.5], [0.0], [0.6]])
    scores = np.stack([base, base + 0.03 + generator.normal(0, 0.02, base.shape)])
    lead = difference(tmp_path, scores, "loss")
    assert lead.low > 0.02
    assert lead.high < 0.04
    assert lead.share_better == 1
    assert not lead.tied
    # The means themselves, which are not paired, overlap widely.
    estimates = [Bootstrap(read_results(tmp_path / "results.jsonl"), 2000).estimate(key) for key in "ab"]
    assert estimates[0].high > estimates[1].mean


def test_better_is_positive_whichever_way_the_metric_goes(tmp_path):
    scores = np.stack([np.full((3, 50), 0.2), np.full((3, 50), 0.5)])
    assert difference(tmp_path, scores, "loss").mean == pytest.approx(0.3)
    assert difference(tmp_path, scores, "accuracy").mean == pytest.approx(-0.3)


def test_rows_count_by_their_weights(tmp_path):
    scores = np.stack([np.tile([4.0, 1.0], (2, 1)), np.tile([2.0, 3.0], (2, 1))])
    assert difference(tmp_path, scores, "loss", weights=[3, 1]).mean == pytest.approx(0.0)


def test_equal_methods_are_better_in_half_of_the_draws(tmp_path):
    lead = difference(tmp_path, np.ones((2, 3, 20)))
    assert (lead.low, lead.high, lead.share_better, lead.tied) == (0, 0, 0.5, True)


def test_one_seed_draws_rows_only_and_says_so(tmp_path):
    lead = difference(tmp_path, made.right_or_wrong([0.2, 0.0], seeds=1))
    assert lead.resampled == "rows"
    assert lead.low < lead.mean < lead.high


def test_without_scores_only_seeds_are_drawn(tmp_path):
    lines = made.comparison({"a": 0.0, "b": 0.1}, sweep=False)
    for line in lines[3:]:
        line.update(test_scores=None, test_weights=None)
    bootstrap = Bootstrap(read_results(made.write(tmp_path, lines)))
    assert bootstrap.difference("a", "b").resampled == bootstrap.estimate("a").resampled == "seeds"
    one = Bootstrap(read_results(made.write(tmp_path, lines[:4] + lines[6:7])))
    assert one.difference("a", "b").resampled == "nothing"
    assert one.difference("a", "b").low is None
    assert one.difference("a", "b").tied


def test_methods_are_compared_on_the_seeds_that_both_have(tmp_path):
    lines = made.comparison({"a": 0.0, "b": 0.1}, sweep=False)[:-1]
    ranking = rank(read_results(made.write(tmp_path, lines)), 1000)
    assert next(iter(ranking.differences.values())).seeds == (0, 1)
    assert ranking.estimates["a"].seeds == (0, 1, 2)


def test_the_same_rows_give_the_same_figures(tmp_path):
    comparison = read_results(made.write(tmp_path, made.comparison({"a": 0.0, "b": 0.1})))
    assert Bootstrap(comparison, 2000).difference("a", "b") == Bootstrap(comparison, 2000).difference("a", "b")


def test_an_interval_of_a_share_stays_within_0_and_1(tmp_path):
    lines = made.comparison({"a": 0.3, "b": 0.25})
    ranking = rank(read_results(made.write(tmp_path, lines)), 2000)
    assert all(0 <= e.low <= e.mean <= e.high <= 1 for e in ranking.estimates.values())
