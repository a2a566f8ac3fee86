"""Rows of test sets: every bad one is named with its place, and a limit is a limit."""

import json

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.evaluate.rows import read_examples, read_questions


def test_all_bad_questions_are_named_with_their_lines(jsonl):
    rows = [{"question": "a", "answer": 1}, {"question": " ", "answer": "1"}, "{", {"answer": "1"}, [1]]
    path = jsonl([*rows, {"question": "a", "answer": True}, {"question": "a", "answer": None}, {"question": 3}])
    with pytest.raises(FormatError) as caught:
        read_questions(path)
    said = str(caught.value)
    for part in (
        ":2: 'question' is ' '",
        ":3: not valid JSON",
        ":4: no 'question'",
        ":5: holds a list",
        ":6: 'answer'",
    ):
        assert f"rows.jsonl{part}" in said
    assert said.endswith("; and 2 more")
    assert read_questions(path, limit=1) == [("a", "1")]


def test_columns_rename_and_numbers_are_answers(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("query,reply\nHow much?,12.50\n")
    assert read_questions(path, {"question": "query", "answer": "reply"}) == [("How much?", "12.50")]
    with pytest.raises(ConfigError, match="columns: got text, wanted question and answer"):
        read_questions(path, {"text": "query"})
    with pytest.raises(FormatError, match=r"no 'question' and no 'answer'; it has query, reply; name the columns"):
        read_questions(path)


def test_examples_are_those_of_training(jsonl, tmp_path):
    assert read_examples(jsonl([{"query": "q", "response": "r"}]), "sft") == [{"prompt": "q", "completion": "r"}]
    assert read_examples(jsonl([{"input_ids": [1, 2]}]), "sft") == [{"input_ids": [1, 2]}]
    rows = jsonl([{"review": "fine", "stars": 5}])
    columns = {"text": "review", "label": "stars"}
    assert read_examples(rows, "classification", columns) == [{"text": "fine", "label": "5"}]
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert read_examples(tmp_path / "a.txt", "sft") == [{"text": "one\ntwo\n"}]


def test_a_limit_ends_before_rows_that_are_bad(jsonl):
    path = jsonl([{"text": "a"}, {"text": "b"}, {"text": ""}])
    assert len(read_examples(path, "sft", limit=2)) == 2
    with pytest.raises(FormatError, match=r"rows\.jsonl:3: 'text' is empty"):
        read_examples(path, "sft")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_files_without_rows_are_refused(tmp_path, content):
    for name, said in (("a.jsonl", "no rows"), ("a.txt", "no text")):
        (tmp_path / name).write_text(content)
        with pytest.raises(FormatError, match=said):
            read_examples(tmp_path / name, "sft")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match=r"b\.txt: not UTF-8 text"):
        read_examples(tmp_path / "b.txt", "sft")
    (tmp_path / "c.json").write_text(json.dumps([3]))
    with pytest.raises(FormatError, match="holds a int"):
        read_examples(tmp_path / "c.json", "sft")
