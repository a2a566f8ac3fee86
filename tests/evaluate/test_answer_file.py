"""Answers kept as they come: what a kill leaves, and which runs may go on."""

import json

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.evaluate.answer_file import ANSWERS, appending, claim, read_answers, stamp
from flashbone.evaluate.exact_match import Answered

FIRST = Answered(3, "it is 4\n#### 4", "4", "4", True, 9)
SECOND = Answered(0, "ähm", None, "5", False, 2)


def test_answers_are_read_as_they_were_written(tmp_path):
    for one in (FIRST, SECOND):
        with appending(tmp_path) as file:
            file.add(one)
    assert read_answers(tmp_path) == [FIRST, SECOND]


def test_a_line_that_a_kill_cut_short_is_forgotten_and_does_not_spoil_the_next(tmp_path):
    with appending(tmp_path) as file:
        file.add(FIRST)
    path = tmp_path / ANSWERS
    path.write_bytes(path.read_bytes() + '{"row": 0, "text": "ä'.encode()[:-1])
    assert read_answers(tmp_path) == [FIRST]
    with appending(tmp_path) as file:
        file.add(SECOND)
    assert read_answers(tmp_path) == [FIRST, SECOND]


def test_an_answer_is_in_the_file_before_the_next_one_is_asked_for(tmp_path):
    with appending(tmp_path) as file:
        file.add(FIRST)
        assert read_answers(tmp_path) == [FIRST]


def test_a_line_that_is_no_answer_is_named(tmp_path):
    (tmp_path / ANSWERS).write_text('{"row": 1}\n')
    with pytest.raises(FormatError, match=r"answers\.jsonl:1: is no answer"):
        read_answers(tmp_path)


def test_the_same_settings_may_go_on_and_others_are_named(tmp_path):
    folder = tmp_path / "out"
    claim(folder, {"model": "m", "limit": 3, "tasks": ()})
    claim(folder, {"model": "m", "limit": 3, "tasks": ()})
    with pytest.raises(ConfigError, match=r"limit was 3, is 4; merge was null, is true; choose another output"):
        claim(folder, {"model": "m", "limit": 4, "tasks": (), "merge": True})


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="none of an evaluation"):
        claim(tmp_path, {})
    with pytest.raises(ConfigError, match="a file is in the way"):
        claim(tmp_path / "thesis.txt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_stamp_sees_a_changed_byte_and_a_new_file(tmp_path):
    (tmp_path / "a").write_text(json.dumps({"r": 8}))
    first = stamp(tmp_path)
    assert stamp(tmp_path) == first
    (tmp_path / "a").write_text(json.dumps({"r": 9}))
    second = stamp(tmp_path)
    (tmp_path / "b").write_text("")
    assert len({first, second, stamp(tmp_path)}) == 3
