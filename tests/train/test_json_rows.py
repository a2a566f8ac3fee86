"""Files named .json: a list, a list under "data", one object, and JSON Lines under that name; what is refused."""

import pytest

from flashbone.errors import FormatError
from flashbone.train.data.rows import read_rows


def rows_of(tmp_path, text: str) -> list:
    file = tmp_path / "rows.json"
    file.write_text(text)
    return [row for _, row in read_rows(file)]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('{"version": 1, "data": [{"a": 1}]}', [{"a": 1}]),
        ('{"a": 1}', [{"a": 1}]),
        ('{"a": 1}\n\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("", []),
    ],
)
def test_each_form_of_a_json_file_gives_its_rows(tmp_path, text, rows):
    assert rows_of(tmp_path, text) == rows


def test_rows_say_where_they_stand(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[{"a": 1}, {"a": 2}]')
    assert [where for where, _ in read_rows(file)] == [f"{file}: row 1", f"{file}: row 2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a" 2}]', r"rows\.json:2: not valid JSON: .* at column 7"),
        ("3", r"rows\.json: holds a int; a list of objects was wanted"),
    ],
)
def test_what_is_no_list_of_rows_is_refused_where_it_breaks(tmp_path, text, message):
    with pytest.raises(FormatError, match=message):
        rows_of(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"a", r"rows\.txt: unknown kind of file; .*\.jsonl.* are read"),
        ("rows.json", b'["\xff"]', r"rows\.json: not UTF-8 text .*; save it as UTF-8"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        list(read_rows(tmp_path / name))
    with pytest.raises(FormatError, match=r"gone\.json: no such data file"):
        list(read_rows(tmp_path / "gone.json"))
