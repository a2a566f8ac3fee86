"""Answers kept as they come: what a kill leaves, and which runs may go on."""

import json

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.evaluate import answer_file
from flashbone.evaluate.answer_file import ANSWERS, appending, claim, claimed, read_answers, stamp
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


def test_two_runs_at_once_do_not_share_a_folder(tmp_path):
    """One that failed could take away what the other has answered meanwhile."""
    folder = tmp_path / "out"
    with claimed(folder, {"model": "m"}):
        with pytest.raises(ConfigError, match="another evaluation is writing to it"), claimed(folder, {"model": "m"}):
            raise AssertionError("had the folder twice")
        with appending(folder) as file:
            file.add(FIRST)
    with claimed(folder, {"model": "m"}):
        assert read_answers(folder) == [FIRST]


@pytest.mark.parametrize("answered", [False, True])
def test_a_run_that_fails_before_its_first_answer_leaves_nothing(tmp_path, answered):
    folder = tmp_path / "out"

    def run():
        with claimed(folder, {"model": "m"}), appending(folder) as file:
            if answered:
                file.add(FIRST)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert folder.exists() is answered
    assert read_answers(folder) == ([FIRST] if answered else [])


def test_a_folder_that_a_failed_run_removes_meanwhile_is_claimed_again(tmp_path, monkeypatch):
    folder, calls = tmp_path / "out", []

    def claim_and_lose(*arguments):
        claim(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            (folder / answer_file.SETTINGS).unlink()

    monkeypatch.setattr(answer_file, "claim", claim_and_lose)
    with claimed(folder, {"model": "m"}):
        assert len(calls) == 2
        assert (folder / answer_file.SETTINGS).exists()
