"""The table has the same rows everywhere, and bold only what is best for sure; costs are measured over the same way."""

import comparison_rows as made
import pytest

from flashbone.compare import report
from flashbone.compare.reading import read_results
from flashbone.compare.report import costs, tables, words
from flashbone.compare.report.ranking import rank


def ranking(tmp_path, lines):
    return rank(read_results(made.write(tmp_path, lines)), 1000)


def rows_of(tmp_path, lines):
    return tables.results_table(ranking(tmp_path, lines)).rows


def test_rows_go_from_best_to_worst_then_bounds_unmatched_and_failed(tmp_path):
    rows = rows_of(tmp_path, made.all_methods())
    assert len(rows) == 17
    groups = [row.group for row in rows]
    assert groups == sorted(
        groups, key=lambda g: ["bound", "unmatched", "failed"].index(g) if g in ("bound", "unmatched", "failed") else -1
    )
    figures = [row.cells["test"].value for row in rows[:13]]
    assert figures == sorted(figures, reverse=True)
    assert rows[-1].error == "virtual tokens do not fit"


def test_only_a_sole_winner_is_bold(tmp_path):
    won = rows_of(tmp_path, made.comparison({"a": 0.1, "b": -0.4}))
    assert [row.cells["test"].best for row in won] == [True, False]
    tied = rows_of(tmp_path, made.comparison({"a": 0.0, "b": 0.0}))
    assert not any(row.cells["test"].best for row in tied)


def test_a_cost_is_bold_if_its_worst_seed_beats_every_other_ones_best(tmp_path):
    lines = made.comparison({"a": 0.0, "b": 0.0}, sweep=False)
    for line, step, peak in zip(lines[3:], (10, 11, 12, 12.5, 13, 14), (10, 20, 30, 25, 35, 45), strict=True):
        line.update(step_ms=step, peak_mib=peak)
    cells = {row.method: row.cells for row in rows_of(tmp_path, lines)}
    assert cells["a"]["step_ms"].best
    assert not cells["a"]["peak_mib"].best
    one = rows_of(tmp_path, lines[:4] + lines[6:7])
    assert not any(cell.best for row in one for cell in row.cells.values())


def test_figures_are_those_of_the_counted_runs(tmp_path):
    lines = made.comparison({"a": 0.0, "b": 0.0})
    for line in lines:
        if line["kind"] == "run" and not line["counted"]:
            line.update(step_ms=9e9, peak_mib=9e9)
    cells = next(row.cells for row in rows_of(tmp_path, lines) if row.method == "a")
    assert cells["parameters"].text == "294,912 (+1.2 %)"
    lines[1]["off_budget"] = -0.0001
    near = rows_of(tmp_path, lines)
    assert {row.cells["parameters"].text for row in near} == {"294,912", "294,912 (+1.2 %)"}
    assert (cells["step_ms"].text, cells["peak_mib"].text, cells["above_model_mib"].text) == ("400", "1,200", "130")
    assert cells["adapter_bytes"].text == "1.13"
    assert cells["rate"].text == "0.003"


def test_mean_curves_have_gaps_where_a_seed_was_not_finite(tmp_path):
    lines = made.comparison({"a": 0.0}, sweep=False)
    lines[2]["held_out"]["loss"][1] = None
    curve = costs.band(read_results(made.write(tmp_path, lines)).counted("a"), "held_out")
    assert curve.mean[1] is curve.low[1] is curve.high[1] is None
    assert curve.low[2] < curve.mean[2] < curve.high[2]


def test_long_training_curves_are_averaged_in_equal_spans(tmp_path):
    lines = made.comparison({"a": 0.0}, seeds=(0,), sweep=False)
    steps = list(range(1, 1001))
    lines[2]["train"] = {"step": steps, "seconds": steps, "loss": steps}
    curve = costs.band(read_results(made.write(tmp_path, lines)).counted("a"), "train")
    assert len(curve.step) <= 64
    assert curve.mean[0] == pytest.approx(sum(range(1, curve.step[0] + 1)) / curve.step[0])
    assert curve.step[-1] == 1000


def test_the_speed_of_learning_has_its_columns(tmp_path):
    rows = {row.method: row for row in rows_of(tmp_path, made.comparison({"lora": 0.0, "b": 0.01, "c": -0.5}))}
    assert [rows[key].cells["steps"].text for key in ("lora", "c")] == ["32 (32 to 32)", "never"]
    assert rows["lora"].cells["lead"].text == words.NOTHING
    assert rows["c"].cells["lead"].text.startswith(words.MINUS)
    assert rows["c"].cells["seconds"].value is None
    assert rows["b"].cells["leeway"].text.count("+") == 2


def test_markdown_has_the_rows_and_escapes_what_would_be_marks(tmp_path):
    path = made.write(tmp_path, made.comparison({"a": 0.1, "b": -0.4}, titles={"a": "one|two *x*"}))
    lines = report.comparison_markdown(path).splitlines()
    assert lines[0].startswith("| method | test accuracy |")
    assert lines[2].startswith(r"| one\|two \*x\* (best) | **")
    assert {line.replace(r"\|", "").count("|") for line in lines} == {
        len(tables.results_table(ranking(tmp_path, made.comparison({"a": 0.1}))).columns) + 1
    }


@pytest.mark.parametrize("width", ["80", "200"])
def test_the_terminal_shows_tables_and_verdict(tmp_path, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    lines = made.all_methods()
    lines[1]["title"] = "[red]bone[/red]"
    report.print_comparison(made.write(tmp_path, lines))
    shown = capsys.readouterr().out
    assert "what the methods reached" in shown
    assert "how fast they learned" in shown
    assert "what they cost" in shown
    assert "tied for best" in shown
    assert "…" not in shown
    assert "[red]" in shown
    assert max(map(len, shown.splitlines())) <= int(width)
