"""CSV files: whatever separates their cells, cells of any length, and what is refused."""

import csv

import pytest

from flashbone.errors import FormatError
from flashbone.train.data.rows import BadRow, read_rows

ROWS = [{"prompt": "one, two; three", "completion": 'a "b"\tc'}, {"prompt": "x\ny", "completion": "|"}]


def written(path, rows=ROWS, **form):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **form)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_any_usual_separator_is_read(tmp_path, name, separator, quoting):
    path = written(tmp_path / name, delimiter=separator, quoting=quoting)
    assert [row for _, row in read_rows(path)] == ROWS


def test_one_column_needs_no_separator(tmp_path):
    (tmp_path / "d.csv").write_text("text\na;b\nc d\n")
    assert [row for _, row in read_rows(tmp_path / "d.csv")] == [{"text": "a;b"}, {"text": "c d"}]


def test_cells_may_be_of_any_length(tmp_path):
    rows = [{"prompt": "x" * 200_000, "completion": "y" * 2_000_000}]
    assert [row for _, row in read_rows(written(tmp_path / "d.csv", rows))] == rows


def test_rows_are_named_by_the_line_on_which_they_begin(tmp_path):
    path = written(tmp_path / "d.csv", [*ROWS, ROWS[0]])
    assert [where for where, _ in read_rows(path)] == [f"{path}:2", f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize("names", ["a,b,a", "a;b;a", ",a,"])
def test_columns_of_one_name_are_refused(tmp_path, names):
    (tmp_path / "d.csv").write_text(f"{names}\n1,2,3\n")
    with pytest.raises(FormatError, match=r"d\.csv: several columns have the name '(a|)'; rename or remove them"):
        list(read_rows(tmp_path / "d.csv"))


@pytest.mark.parametrize("cell", ['"no end', '"a" b', '"a"b"'])
def test_stray_quotes_are_refused_instead_of_joining_rows(tmp_path, cell):
    (tmp_path / "d.csv").write_text(f"text,more\n{cell},1\nnext,2\n")
    rows = list(read_rows(tmp_path / "d.csv"))
    assert isinstance(rows[0], BadRow)
    assert "d.csv:2: not valid CSV" in str(rows[0])
    assert "is a quote not closed, or not doubled?" in str(rows[0])
