"""Rows of test sets: every bad one is named with its place, and a limit is a limit."""

import json

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.loading import load_test_rows


def test_all_bad_questions_are_named_with_their_lines(jsonl):
    rows = [{"question": "a", "answer": 1}, {"question": " ", "answer": "1"}, "{", {"answer": "1"}, [1]]
    path = jsonl([*rows, {"question": "a", "answer": True}, {"question": "a", "answer": None}, {"question": 3}])
    with pytest.raises(FormatError) as caught:
        load_test_rows(path, "exact_match", {})
    message = str(caught.value)
    for part in (
        ":2: 'question' is blank",
        ":3: not valid JSON",
        ":4: no 'question'",
        ":5: holds a list",
        ":6: 'answer'",
    ):
        assert f"rows.jsonl{part}" in message
    assert message.endswith("; and 2 more")
    assert load_test_rows(path, "exact_match", {}, limit=1) == [{"question": "a", "answer": "1"}]


def test_columns_rename_and_numbers_are_answers(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("query,reply\nHow much?,12.50\n")
    columns = {"question": "query", "answer": "reply"}
    assert load_test_rows(path, "exact_match", columns) == [{"question": "How much?", "answer": "12.50"}]
    with pytest.raises(ConfigError, match=r"'text' is not a name of task exact_match \(question, answer, context\)"):
        load_test_rows(path, "exact_match", {"text": "query"})
    with pytest.raises(FormatError, match=r"query, reply fit no format of task exact_match; .*--columns question="):
        load_test_rows(path, "exact_match", {})


def test_examples_are_those_of_training(jsonl, tmp_path):
    assert load_test_rows(jsonl([{"query": "q", "response": "r"}]), "sft", {}) == [{"prompt": "q", "completion": "r"}]
    assert load_test_rows(jsonl([{"input_ids": [1, 2]}]), "sft", {}) == [{"input_ids": [1, 2]}]
    rows = jsonl([{"review": "fine", "stars": 5}])
    columns = {"text": "review", "label": "stars"}
    assert load_test_rows(rows, "classification", columns) == [{"text": "fine", "label": "5"}]
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert load_test_rows(tmp_path / "a.txt", "sft", {}) == [{"text": "one\ntwo\n"}]


def test_a_limit_ends_before_rows_that_are_bad(jsonl):
    path = jsonl([{"text": "a"}, {"text": "b"}, {"text": ""}])
    assert len(load_test_rows(path, "sft", {}, limit=2)) == 2
    with pytest.raises(FormatError, match=r"rows\.jsonl:3: 'text' is empty"):
        load_test_rows(path, "sft", {})


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_files_without_rows_are_refused(tmp_path, content):
    for name, said in (("a.jsonl", "no rows"), ("a.txt", "no text")):
        (tmp_path / name).write_text(content)
        with pytest.raises(FormatError, match=said):
            load_test_rows(tmp_path / name, "sft", {})
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match=r"b\.txt: not UTF-8 text"):
        load_test_rows(tmp_path / "b.txt", "sft", {})
    (tmp_path / "c.json").write_text(json.dumps([3]))
    with pytest.raises(FormatError, match="holds a int"):
        load_test_rows(tmp_path / "c.json", "sft", {})
