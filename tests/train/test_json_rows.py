"""Files named .json: a list, a list under "data", one object, and JSON Lines under that name; what is refused."""

import datasets
import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.folders import open_dataset
from flashbone.train.data.parsing import parse_json
from flashbone.train.data.rows import BadRow, read_rows


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


def nested(depth, opened, closed):
    return '{"text": ' + opened * depth + "1" + closed * depth + "}"


BAD_TEXTS = [
    ('{"text": "a", "text": "b"}', "has the key 'text' twice"),
    ('{"text": "a", "meta": [{"k": 1, "k": 2}]}', "has the key 'k' twice"),
    ('{"text": NaN}', "holds NaN, which is not JSON"),
    ('{"text": "a", "n": -Infinity}', "holds -Infinity, which is not JSON"),
    ('{"text": "a", "n": ' + "9" * 5000 + "}", "holds a number of thousands of digits"),
    ('{"text": "a\\ud800b"}', r"holds \ud800, half of a character that takes two"),
    ('{"text": "a", "\\udfff": 1}', r"holds \udfff, half of a character"),
    (nested(101, "[", "]"), "is nested more than 100 levels deep"),
    (nested(500, '{"a":', "}"), "is nested more than 100 levels deep"),
    (nested(100_000, "[", "]"), "is nested more than 100 levels deep"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_what_json_cannot_keep_is_one_bad_row(tmp_path, kind, text, message):
    file = tmp_path / f"rows.{kind}"
    good = '{"text": "good"}'
    file.write_text("\n".join([good, text, good]) if kind == "jsonl" else f"[{good}, {text}, {good}]")
    rows = list(read_rows(file))
    assert rows[0][1] == {"text": "good"}
    assert isinstance(rows[1], BadRow)
    assert message in str(rows[1])
    assert str(rows[1]).startswith(f"{file}:2: " if kind == "jsonl" else f"{file}: row 2: ")
    assert "\n" not in str(rows[1])


def test_pairs_of_surrogates_are_characters(tmp_path):
    assert rows_of(tmp_path, r'[{"text": "\ud83d\ude00"}]') == [{"text": "😀"}]


@pytest.mark.parametrize("text", ["[", "[1,", "[1 2]", '[{"a": 1}', '{"a": 1', "[1,]", "nul", '["a]'])
def test_texts_that_break_off_are_refused_in_one_line(tmp_path, text):
    with pytest.raises(FormatError, match=r"rows\.json:1: not valid JSON: ") as error:
        rows_of(tmp_path, text)
    assert "\n" not in str(error.value)


def test_keys_beside_data_are_named(tmp_path, caplog):
    rows_of(tmp_path, '{"version": 1, "license": "x", "data": [{"a": 1}]}')
    assert "keys not used: version, license; the rows are those of data" in caplog.text


def test_rows_under_data_that_cannot_be_kept_are_named(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('{"version": {"a": [1]}, "data": [{"a": 1}, {"a": 1, "a": 2}, {"a": 3}], "more": 1}')
    good, bad, last = read_rows(file)
    assert (good, last) == ((f"{file}: row 1", {"a": 1}), (f"{file}: row 3", {"a": 3}))
    assert str(bad) == f"{file}: row 2: has the key 'a' twice"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.ndjson", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_files_are_read_in_the_encoding_that_they_name(tmp_path, name, encoding):
    lines = ["a", "é"] if name[-2:] == "sv" else ['{"a": "é"}']
    (tmp_path / name).write_bytes("\r\n".join(lines).encode(encoding))
    assert [row for _, row in read_rows(tmp_path / name)] == [{"a": "é"}]


@pytest.mark.parametrize(
    ("name", "words"), [("a.jsonl.gz", "unpack it"), ("a.xlsx", "save the sheet as .csv"), ("a.txt", "write each text")]
)
def test_files_of_other_kinds_are_refused_with_what_to_do(tmp_path, name, words):
    (tmp_path / name).write_text("a")
    with pytest.raises(FormatError, match=rf"unknown kind of file; .* are read; {words}"):
        list(read_rows(tmp_path / name))


def test_a_pair_of_escaped_halves_is_a_character_and_one_half_is_refused():
    assert parse_json(r'{"a": "\ud83d\ude00 \\ud83d"}') == {"a": "\U0001f600 \\ud83d"}
    for text in (r'{"a": ["\ud83d"]}', r'{"\ude00": 1}', r'"\ud83d x \ude00"'):
        with pytest.raises(FormatError, match="half of a character that takes two"):
            parse_json(text)


def test_what_save_to_disk_wrote_is_a_dataset(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    assert open_dataset(str(tmp_path / "one"), None, "train")["text"][:] == ["a", "b"]
    assert open_dataset(str(tmp_path / "two"), None, "test")["text"][:] == ["b"]
    assert next(iter(open_dataset(str(tmp_path / "two"), None, "train", streaming=True))) == {"text": "a"}
    with pytest.raises(ConfigError, match=r"data\.split dev: .* has train, test"):
        open_dataset(str(tmp_path / "two"), None, "dev")
