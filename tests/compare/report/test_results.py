"""A results.jsonl is read whole or refused in one line that names the place."""

import comparison_rows as made
import pytest

from flashbone.compare.reading import read_results
from flashbone.errors import FormatError


def test_a_whole_file_is_read(tmp_path):
    comparison = read_results(made.write(tmp_path, made.comparison({"lora": 0.0, "bone": 0.1})))
    assert comparison.header.metric == "accuracy"
    assert comparison.header.fairness.checked
    assert [m.method for m in comparison.methods] == ["lora", "bone"]
    runs = comparison.counted("bone")
    assert [run.seed for run in runs] == [0, 1, 2]
    assert runs[0].figure("accuracy") == pytest.approx(runs[0].test["accuracy"])
    assert runs[0].last_held_out == runs[0].held_out.loss[-1]


def test_an_unfinished_comparison_with_failures_is_read(tmp_path):
    lines = [made.header(finished=False), made.method("a", status="unfinished", chosen=None), made.method("b")]
    lines.append(
        {
            "kind": "run",
            "method": "b",
            "learning_rate": 0.1,
            "seed": 0,
            "counted": False,
            "status": "failed",
            "error": "no",
        }
    )
    comparison = read_results(made.write(tmp_path, lines))
    assert comparison.counted("a") == comparison.counted("b") == []
    assert comparison.runs[0].error == "no"


def test_numbers_that_were_not_finite_are_none_and_make_no_figure(tmp_path):
    lines = made.comparison({"a": 0.0}, sweep=False)
    lines[2]["test_scores"][3] = None
    lines[2]["held_out"]["loss"][-1] = None
    run = read_results(made.write(tmp_path, lines)).runs[0]
    assert run.figure("accuracy") is None
    assert run.last_held_out is None


def test_without_scores_of_rows_the_figure_of_the_test_counts(tmp_path):
    lines = made.comparison({"a": 0.0}, sweep=False)
    lines[2].update(test_scores=None, test_weights=None, test={"accuracy": 0.5})
    assert read_results(made.write(tmp_path, lines)).runs[0].figure("accuracy") == 0.5


def test_a_title_of_two_methods_gets_its_key(tmp_path):
    lines = made.comparison({"a": 0.0, "b": 0.0}, titles={"a": "LoRA", "b": "LoRA"}, sweep=False)
    comparison = read_results(made.write(tmp_path, lines))
    assert comparison.label("b") == "LoRA [b]"


def broken(change):
    lines = made.comparison({"a": 0.0}, sweep=False)
    change(lines)
    return lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ls: ls.pop(0), "line 1: got \"method\" as kind; the comparison must be line 1"),
        (lambda ls: ls[0].update(version=2), "line 1: version: got 2, wanted 1"),
        (lambda ls: ls[0].pop("metric"), "line 1: metric: is missing"),
        (lambda ls: ls[0].update(seeds="0", finished=1), "seeds: got '0'.*; finished: got 1, wanted true or false"),
        (lambda ls: ls[0]["fairness"].update(problems="x"), "line 1, fairness: problems: got 'x', wanted a list"),
        (lambda ls: ls[1].update(learning_rates=[True]), "line 2: learning_rates: got"),
        (lambda ls: ls.insert(2, ls[1]), "line 3: the method \"a\" appears twice"),
        (lambda ls: ls[3].update(method="b"), "line 4: got a run of \"b\", but no line above describes that method"),
        (lambda ls: ls[3].update(seed=0), "line 4: the run of a with learning rate 0.003 and seed 0 appears twice"),
        (lambda ls: ls[3]["train"]["loss"].pop(), "line 4, train: got 32 steps, 32 seconds and 31 losses"),
        (lambda ls: ls[3]["test_weights"].pop(), "line 4: got 120 test_scores and 119 test_weights"),
        (lambda ls: ls[3].update(test_scores=[1], test_weights=[1]), "line 4: got scores of 1 test rows, but"),
        (lambda ls: ls[3].update(test={"accuracy": "x"}), "line 4: test: got .*'x'}, wanted an object .* or null"),
        (lambda ls: ls[3].update(kind="x"), "line 4: got \"x\" as kind, wanted method or run"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path, change, message):
    with pytest.raises(FormatError, match=message) as caught:
        read_results(made.write(tmp_path, broken(change)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("{", "line 1: not valid JSON: .*; was the file cut off"),
        ("[1]", "line 1: wanted a JSON object, got a list"),
        ("[" * 100_000, "line 1: not valid JSON: .*recursion"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        read_results(path)


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path):
    with pytest.raises(FormatError, match="cannot be read"):
        read_results(tmp_path / "results.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(FormatError, match="cannot be read"):
        read_results(tmp_path / "binary.jsonl")


def test_a_number_that_is_not_json_is_refused(tmp_path):
    path = made.write(tmp_path, made.comparison({"a": 0.0}, sweep=False))
    path.write_text(path.read_text().replace('"step_ms": 400.0', '"step_ms": NaN'))
    with pytest.raises(FormatError, match=r"line 3: step_ms: got nan, wanted a number or null"):
        read_results(path)
