"""The verdict: three sentences that follow from the figures, whichever method wins, and notes on every problem."""

import re

import comparison_rows as made
import numpy as np
import pytest

from flashbone.compare.reading import read_results
from flashbone.compare.report.ranking import rank
from flashbone.compare.report.verdict import judge


def verdict(tmp_path, lines, draws=2000):
    ranking = rank(read_results(made.write(tmp_path, lines)), draws)
    judged = judge(ranking)
    for sentence in filter(None, (judged.best, judged.speed, judged.cost)):
        # One full stop, at the end: those inside of figures have a digit after them.
        assert re.fullmatch(r"[^.]*(\.\d[^.]*)*\.", sentence), sentence
    assert judged.text == " ".join(filter(None, (judged.best, judged.speed, judged.cost)))
    return judged


@pytest.mark.parametrize("winner", ["bone", "lora", "x"])
def test_whichever_method_wins_is_named_with_its_lead(tmp_path, winner):
    truth = {key: (0.1 if key == winner else -0.3) for key in ("lora", "bone", "x")}
    judged = verdict(tmp_path, made.comparison(truth))
    assert judged.best.startswith(f"{winner} ended best on the test set among the 3 methods matched in size: accuracy ")
    assert re.search(
        r"the next, by \d+\.\d points \(\d+\.\d to \d+\.\d\) at 95 % confidence, better in over", judged.best
    )
    assert judged.cost.startswith("It peaked at ")


def test_ties_are_named_with_what_they_cost(tmp_path):
    lines = made.comparison({"a": 0.0, "b": 0.0, "c": 0.01, "d": -0.4})
    judged = verdict(tmp_path, lines)
    assert judged.best.startswith("Of the 4 methods matched in size, 3 are tied for best on the test set (accuracy ")
    assert "d " not in judged.best.split("since")[0].split("(")[1]
    assert re.search(r"better than [abc] in \d\d % of resamplings", judged.best)
    least = min((line["peak_mib"], line["method"]) for line in lines if line["kind"] == "run" and line["method"] != "d")
    assert (
        f"{least[1]} needed the least memory ({least[0]:,.0f} MiB, the others 1.13 to 1.26 times that)" in judged.cost
    )


def test_two_tied_methods_are_both(tmp_path):
    judged = verdict(tmp_path, made.comparison({"a": 0.0, "b": 0.0}))
    assert judged.best.startswith("Both methods matched in size are tied for best")
    assert "their difference includes 0" in judged.best


def test_many_tied_methods_are_listed_with_the_range(tmp_path):
    judged = verdict(tmp_path, made.comparison(dict.fromkeys("abcdef", 0.0)))
    assert re.search(r"(All|Of the) 6 methods .* \(accuracy from \d+\.\d % to \d+\.\d %: ", judged.best)


def test_the_lower_loss_wins(tmp_path):
    generator = np.random.default_rng(0)
    base = generator.gamma(4, 0.5, 100)
    lines = [made.header("loss"), made.method("a"), made.method("b")]
    for key, more in (("a", 0.2), ("b", 0.0)):
        lines += [made.run(key, s, base + more + generator.normal(0, 0.02, 100), metric="loss") for s in range(3)]
    judged = verdict(tmp_path, lines)
    assert judged.best.startswith("b ended best")
    assert re.search(r"by 0\.\d{4} \(0\.\d{4} to 0\.\d{4}\)", judged.best)
    assert judged.cost.count("least memory") == 1


def test_bounds_and_unmatched_methods_are_not_candidates_but_noted_if_better(tmp_path):
    lines = made.comparison({"a": -0.3, "b": -0.4, "full": 0.1, "fixed": 0.1})
    lines[3].update(bound=True, matched=False)
    lines[4].update(matched=False, fixed=True)
    judged = verdict(tmp_path, lines)
    assert "full" not in judged.text
    assert "2 methods" in judged.best or "Both methods" in judged.best
    assert any(note.startswith("Better than the best matched method, but no candidates") for note in judged.notes)


def test_one_method_alone_has_nothing_to_beat(tmp_path):
    judged = verdict(tmp_path, made.comparison({"a": 0.0}))
    assert judged.best.startswith("a is the only method matched in size that has a figure on the test set (accuracy ")
    assert judged.cost == "It peaked at 1,200 MiB, and a step took 400 ms."


def test_all_failed_nothing_finished_and_nothing_at_all_have_verdicts(tmp_path):
    failed = [made.header(), *(made.method(k, status="failed", error=f"{k} broke", chosen=None) for k in "ab")]
    judged = verdict(tmp_path, failed)
    assert judged.best == "All of 2 methods failed, so none can be called best."
    assert judged.cost == "The first error was that of a: a broke."
    assert "b failed: b broke." in judged.notes
    pending = [made.header(finished=False), *(made.method(k, status="unfinished", chosen=None) for k in "ab")]
    judged = verdict(tmp_path, pending)
    assert judged.cost == "Of 2 methods, 2 did not run to the end and 0 failed."
    assert judged.notes[0].startswith("The comparison is unfinished: a and b still to run.")
    verdict(tmp_path, [made.header(finished=False)])


def test_only_unmatched_methods_give_no_winner(tmp_path):
    lines = made.comparison({"a": 0.0})
    lines[1].update(matched=False)
    assert verdict(tmp_path, lines).cost == "Only bounds and unmatched methods have one (a): see the table."


def test_a_run_that_diverged_counts_against_its_method(tmp_path):
    lines = made.comparison({"a": 0.2, "b": 0.0, "c": 0.0})
    next(line for line in lines if line["kind"] == "run" and line["counted"])["test_scores"][0] = None
    judged = verdict(tmp_path, lines)
    assert "a" not in re.findall(r"\b[abc]\b", judged.text.replace(" a step", ""))
    assert "Not ranked, since a run's test figure was not finite: a." in judged.notes


def test_a_method_that_failed_with_one_seed_is_not_noted_as_diverged(tmp_path):
    lines = made.comparison({"a": 0.0, "b": 0.0, "c": 0.0})
    lines[1].update(status="failed", error="seed 2: no")
    assert verdict(tmp_path, lines).notes == ("a failed: seed 2: no.",)


def test_seconds_of_tasks_on_a_cluster_are_noted(tmp_path):
    (note,) = [
        note for note in verdict(tmp_path, made.comparison({"a": 0.0, "b": 0.0}, jobs="ray")).notes if "Ray" in note
    ]
    assert note == "Runs were tasks of a Ray cluster: compare their seconds only if its machines are alike."


def test_problems_are_noted(tmp_path):
    lines = made.comparison({"a": 0.0, "b": 0.0}, seeds=(0,), jobs=2)
    lines[0]["fairness"]["problems"] = ["b saw other rows than a"]
    lines[1].update(at_edge="highest")
    lines.append(
        {
            "kind": "run",
            "method": "b",
            "learning_rate": 0.3,
            "seed": 0,
            "counted": False,
            "status": "failed",
            "error": "out of memory",
        }
    )
    notes = verdict(tmp_path, lines).notes
    for words in (
        "Fairness: b saw other rows than a.",
        "One seed only",
        "highest of those tried for a",
        "A run of b failed (seed 0 at 0.3): out of memory.",
        "2 runs ran at the same time",
    ):
        assert any(words in note for note in notes), words
    two = verdict(tmp_path, made.comparison({"a": 0.0, "b": 0.0}, seeds=(0, 1))).notes
    assert any("Two seeds only" in note for note in two)
    assert verdict(tmp_path, made.comparison({"a": 0.0, "b": 0.0})).notes == ()


def test_an_unfinished_comparison_is_judged_so_far(tmp_path):
    lines = made.comparison({"a": 0.1, "b": -0.3, "c": 0.0}, finished=False)[:-5]
    lines[3].update(status="unfinished", chosen=None)
    judged = verdict(tmp_path, lines)
    assert judged.best.startswith(
        "a ended best on the test set among the 2 methods matched in size that have a figure so far"
    )
    assert judged.notes[0] == "The comparison is unfinished: c still to run. All figures are of what has run so far."
