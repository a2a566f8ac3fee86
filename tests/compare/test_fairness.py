"""What was not the same for all methods is told, whatever it was; and rates are chosen by held-out rows alone."""

from dataclasses import replace

import pytest

from flashbone.compare import about, fairness
from flashbone.compare.config import ComparedData, ComparisonConfig, ListedMethod
from flashbone.compare.progress import MethodProgress
from flashbone.compare.results import LossCurve, Provenance, RunRow
from flashbone.compare.sizes import MethodSize

COMPARISON = ComparisonConfig(model="m", data=ComparedData(path="d", test=1), output="o", seeds=[0, 1])


PLACE = Provenance("cpu", "a CPU, 2 threads", {"torch": "2"}, "a", "2026-01-01")


def run(seed=0, rate=1e-3, **changes) -> RunRow:
    fields = {
        "status": "ok",
        "digest": f"seed {seed}",
        "tokens": 100,
        "steps": 4,
        "adapter_parameters": 1000,
        "about": PLACE,
        "overlap": {"learned": 0, "held_out": 0},
        "held_out": curve(2.0, 1.0),
    }
    return RunRow(**{"method": "", "seed": seed, "counted": False, "learning_rate": rate, **fields, **changes})


def curve(*losses, **scores) -> LossCurve:
    return LossCurve(tuple(range(len(losses))), (None,) * len(losses), losses, **scores)


def method(label: str, parameters: int = 1000, runs: tuple = (run(0), run(1))) -> MethodProgress:
    size = MethodSize("r = 1", {}, parameters, parameters, 10**6, parameters / 1000 - 1, True)
    listed = ListedMethod(label, label, {}, (1e-3,))
    return MethodProgress(listed, size, {(one.learning_rate, one.seed): one for one in runs})


def test_equal_runs_have_no_problems():
    assert fairness.problems(COMPARISON, [method("bone"), method("lora")]) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("digest", "c", "seed 1: lora learned other rows, or in another order than bone"),
        ("tokens", 99, "seed 1: lora learned other numbers of tokens than bone"),
        ("steps", 5, "seed 1: lora took other numbers of steps than bone"),
        ("about", replace(PLACE, device="cuda"), "on different device: cpu; cuda"),
        (
            "about",
            replace(PLACE, hardware="a CPU, 1 threads"),
            "on different hardware: a CPU, 1 threads; a CPU, 2 threads",
        ),
        ("overlap", {"learned": 3, "held_out": 0}, "3 of the test rows are also learned, word for word"),
        ("overlap", {"learned": 0, "held_out": 2}, "2 of the test rows are also held out, word for word"),
        ("about", replace(PLACE, versions={"torch": "3"}), "different versions of torch"),
        ("about", replace(PLACE, versions={}), "different versions of torch"),
        ("adapter_parameters", 1010, "lora: 1,010 parameters trained, 1,000 were planned"),
    ],
)
def test_whatever_one_run_had_otherwise_is_told(name, value, words):
    unlike = run(0), run(1, **{name: value})
    (problem,) = fairness.problems(COMPARISON, [method("bone"), method("lora", runs=unlike)])
    assert words in problem


def test_matched_sizes_more_than_the_tolerance_apart_are_told():
    runs = (run(adapter_parameters=1031),)
    assert fairness.problems(COMPARISON, [method("bone", 1001), method("lora", 1031, runs)])
    problems = fairness.problems(COMPARISON, [method("bone", 1000), method("lora", 1031, runs)])
    assert "lora has 1,031 parameters, bone 1,000: too far apart" in problems[0]


def rates(*held_out: LossCurve) -> MethodProgress:
    listed = ListedMethod("bone", "bone", {}, (1e-4, 1e-3, 1e-2))
    pairs = zip(listed.learning_rates, held_out, strict=True)
    one = MethodProgress(listed, None, {(rate, 0): run(0, rate, held_out=curve) for rate, curve in pairs})
    one.choose(0)
    return one


def test_the_lowest_held_out_loss_at_the_end_decides():
    one = rates(curve(1, 0.9), curve(1, 0.1, 0.8), curve(1, 0.7))
    assert (one.chosen, one.at_edge) == (1e-2, "highest")
    one = rates(curve(1, 0.9), curve(1, 0.8), curve(1, None))
    assert (one.chosen, one.at_edge) == (1e-3, None)


def test_the_loss_decides_for_classifiers_too():
    held_out = curve(1, 0.5, accuracy=(0, 0.8)), curve(1, 0.9, accuracy=(0, 0.9)), curve(1, 0.8, accuracy=(0, 0.9))
    assert rates(*held_out).chosen == 1e-4


def test_nothing_is_chosen_before_all_rates_have_been_tried():
    one = rates(curve(1, 0.9), curve(1, 0.8), curve(1, 0.7))
    one.chosen = None
    del one.runs[1e-2, 0]
    one.choose(0)
    assert one.chosen is None
    assert one.status([0]) == "unfinished"


def test_a_method_that_fails_with_one_seed_has_no_figure():
    one = method("bone", runs=(run(0), RunRow("", 1, False, "failed", 1e-3, "diverged")))
    one.choose(0)
    assert one.chosen == 1e-3
    assert one.status([0]) == "ok"
    assert one.status([0, 1]) == "failed"
    assert one.status([0, 1, 2]) == "unfinished"


def test_places_of_several_runs_are_all_told():
    there = Provenance("cpu", "another", {"torch": "3"}, None, "2026-01-02")
    made = about.combined([PLACE, there, PLACE])
    assert made.hardware == "a CPU, 2 threads and another"
    assert made.versions == {"torch": "2 and 3"}
    assert (made.commit, made.date, made.device) == ("a", "2026-01-02", "cpu")
