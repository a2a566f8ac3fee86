"""Accuracy and macro-F1 against values worked out by hand, and the trap of an even class average."""

import numpy as np
import pytest

from flashbone.train.classify import confusion, macro_f1, scores


def logits_of(predicted, classes=3):
    return np.eye(classes)[predicted]


def test_scores_match_a_case_worked_out_by_hand():
    # class 0: 1 hit, 2 predicted, 2 true -> 1/2; class 1: 1, 2, 1 -> 2/3; class 2: 1, 1, 2 -> 2/3
    got = scores(logits_of([0, 0, 1, 1, 2]), np.array([0, 2, 1, 0, 2]))
    assert got["accuracy"] == pytest.approx(3 / 5)
    assert got["macro_f1"] == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3)


def test_a_class_that_is_never_found_counts_as_zero():
    got = scores(logits_of([0] * 9 + [0]), np.array([0] * 9 + [1]))
    assert got["accuracy"] == pytest.approx(0.9)
    assert got["macro_f1"] == pytest.approx(18 / 19 / 2)


def test_macro_f1_is_the_mean_over_classes_counted_one_by_one():
    random = np.random.default_rng(0)
    for _ in range(20):
        right, predicted = random.integers(0, 4, 30), random.integers(0, 3, 30)
        want = []
        for label in sorted({*right.tolist(), *predicted.tolist()}):
            pairs = list(zip(right == label, predicted == label, strict=True))
            want.append(2 * pairs.count((True, True)) / sum(map(sum, pairs)))
        assert macro_f1(confusion(right, predicted, 5)) == pytest.approx(sum(want) / len(want))
        assert scores(logits_of(predicted, 5), right)["macro_f1"] == pytest.approx(sum(want) / len(want))
        assert confusion(right, predicted, 5)[2, 1] == sum((right == 2) & (predicted == 1))
