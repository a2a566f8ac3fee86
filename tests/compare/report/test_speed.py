"""How fast methods learn: steps to the reference's last loss, the lead on the way, and what other rates would cost."""

import math

import numpy as np
import pytest
from comparison_rows import RATES, header, method, run, write

from flashbone.compare.reading import read_results
from flashbone.compare.report import words
from flashbone.compare.report.ranking import rank
from flashbone.compare.report.speed import NEVER, Until, speeds
from flashbone.compare.report.verdict import judge

STEPS = [0, 8, 16, 24, 32]


def curve(losses, rows=None, weights=None):
    return {"step": STEPS, "seconds": [s / 2 for s in STEPS], "loss": list(losses), "rows": rows, "weights": weights}


def ranking(tmp_path, curves, draws=2000, **changes):
    """A comparison whose counted runs have these held-out curves, by methods, a list of one for each seed."""
    seeds = range(max(map(len, curves.values())))
    lines = [header(seeds=tuple(seeds), **changes), *(method(key) for key in curves)]
    for key, of_seeds in curves.items():
        lines += [run(key, seed, [1.0, 0.0] * 10, held_out=held) for seed, held in enumerate(of_seeds)]
    return rank(read_results(write(tmp_path, lines)), draws)


def drawn(generator, drop, rows=40, noise=0.1, seeds=3, luck=0.02):
    """Curves of one method that fall by `drop` from 3 in even steps: rows differ, and seeds by luck."""
    level = np.random.default_rng(7).normal(0, 0.5, rows)
    made = []
    for _ in range(seeds):
        at = 3 - drop * np.linspace(0, 1, len(STEPS)) + generator.normal(0, luck)
        losses = at[:, None] + level + generator.normal(0, noise, (len(STEPS), rows))
        made.append(curve(losses.mean(1), losses.tolist(), [1] * rows))
    return made


def test_the_step_to_the_last_loss_of_lora_lies_between_two_evaluations(tmp_path):
    made = ranking(tmp_path, {"lora": [curve([3, 2.5, 2, 1.5, 1])], "bone": [curve([3, 2, 1.5, 0.5, 0.4])]}).speeds
    assert made.reference == "lora"
    assert (made.loss, made.end) == (1, 32)
    assert made.methods["lora"].steps.mean == 32
    assert made.methods["bone"].steps == Until(20.0, None, None)  # one seed and no rows: nothing to resample
    assert made.methods["bone"].seconds.mean == 10.0
    assert made.methods["bone"].lead.mean == pytest.approx((0.5 + 0.5 + 1 + 0.3) * 8 / 32)


def test_a_loss_that_is_not_reached_is_never_and_not_the_last_step(tmp_path):
    lora = [curve([3, 2.5, 2, 1.5, last]) for last in (1.0, 1.1, 0.9)]
    slow = [curve([3, 2.8, 2.5, 2.2, last]) for last in (2.0, 2.1, 1.9)]
    made = ranking(tmp_path, {"lora": lora, "bone": slow})
    bone = made.speeds.methods["bone"]
    assert (bone.steps.mean, bone.steps.low, bone.steps.high) == (NEVER, NEVER, NEVER)
    assert words.until(bone.steps) == words.until(bone.seconds) == "never"
    assert bone.lead.high < 0
    assert "No other method reached" in judge(made).speed
    assert "bone learned slower" in judge(made).speed


def test_an_interval_may_reach_from_a_step_to_never(tmp_path):
    lora = [curve([3, 2.5, 2, 1.5, last]) for last in (1.0, 1.3, 0.7)]
    bone = [curve([3, 2, 1.5, 1.2, last]) for last in (1.3, 0.7, 0.8)]
    until = ranking(tmp_path, {"lora": lora, "bone": bone}).speeds.methods["bone"].steps
    assert 0 < until.low < until.mean < until.high == NEVER
    assert words.until(until).endswith("to never)")


def test_a_lead_on_the_way_is_found_and_equal_methods_tie(tmp_path):
    generator = np.random.default_rng(0)
    curves = {"lora": drawn(generator, 1), "bone": drawn(generator, 1.4), "miss": drawn(generator, 1)}
    made = ranking(tmp_path, curves).speeds.methods
    assert made["bone"].lead.low < 0.2 < made["bone"].lead.high
    assert not made["bone"].lead.tied
    assert made["miss"].lead.tied
    assert made["bone"].lead.resampled == "seeds and rows"
    assert made["bone"].steps.high < 32


def test_equal_methods_are_seldom_told_apart(tmp_path):
    generator, wrong = np.random.default_rng(1), 0
    for _ in range(60):
        curves = {"lora": drawn(generator, 1), "bone": drawn(generator, 1)}
        wrong += not speeds(ranking(tmp_path, curves).results, "lora", 400).methods["bone"].lead.tied
    assert wrong <= 8  # 3 are expected; 9 have a chance of 0.4 %


def test_without_rows_seeds_are_resampled_alone(tmp_path):
    curves = {"lora": [curve([3, 2, 1.5, 1.2, 1])] * 3, "bone": [curve([3, 2, 1.5, 1.2, end]) for end in (1, 0.9, 1.1)]}
    assert ranking(tmp_path, curves).speeds.methods["bone"].lead.resampled == "seeds"


def test_the_best_method_is_the_reference_where_there_is_no_lora(tmp_path):
    lines = [header(seeds=(0,)), method("bone", peft_type="BONE"), method("miss", peft_type="MISS")]
    lines += [run("bone", 0, [1.0] * 10 + [0.0] * 10), run("miss", 0, [1.0] * 15 + [0.0] * 5)]
    assert rank(read_results(write(tmp_path, lines))).speeds.reference == "miss"


def test_a_third_and_three_times_the_rate_are_read_between_the_rates_tried(tmp_path):
    held = curve([3, 2, 1.5, 1.2, 1])
    lines = [header(seeds=(0,)), method("lora"), method("bone", chosen=RATES[0])]
    for key, chosen in (("lora", RATES[1]), ("bone", RATES[0])):
        for rate, loss in zip(RATES, (1.5, 1.0, 2.0), strict=True):
            losses = {**held, "loss": [*held["loss"][:-1], loss]}
            lines.append(run(key, 0, [1.0, 0.0] * 10, rate, rate == chosen, held_out=losses))
    made = rank(read_results(write(tmp_path, lines))).speeds.methods
    assert made["lora"].third == pytest.approx(0.5)
    share = math.log(3) / math.log(RATES[2] / RATES[1])
    assert made["lora"].triple == pytest.approx(share)
    assert made["bone"].third is None
    assert made["bone"].triple == pytest.approx(-0.5)


def test_a_diverged_run_leaves_its_method_without_a_speed(tmp_path):
    curves = {"lora": [curve([3, 2, 1.5, 1.2, 1])], "bone": [curve([3, 2, None, 1.2, 1])]}
    assert list(ranking(tmp_path, curves).speeds.methods) == ["lora"]
