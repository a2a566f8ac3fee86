"""Answers kept as they come: what a kill leaves, and which runs may go on."""

import json
import multiprocessing
import re
from collections import Counter

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.evaluate.answer_file import ANSWERS, SETTINGS, appending, claim, claimed, read_answers, stamp
from flashbone.evaluate.exact_match import Answered
from flashbone.evaluate.results import RESULTS, read_results

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
    with pytest.raises(FormatError, match=r"answers\.jsonl:1: is not an answer"):
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
        with pytest.raises(ConfigError, match="another run is writing to it"), claimed(folder, {"model": "m"}):
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


def claim_at_once(folders, together, held, told):
    """Claim each folder at the same moment as the other process; who has it lets go once both have told."""
    for folder in folders:
        together.wait(200)
        try:
            with claimed(folder, {"model": "m"}):
                told.put((folder.name, "held"))
                held.wait(200)
        except BaseException as error:  # told, whatever it is
            told.put((folder.name, f"{type(error).__name__}: {error}".replace(str(folder), "F")))
            held.wait(200)


@pytest.mark.slow
def test_of_two_evaluations_that_begin_at_once_one_has_the_folder_and_one_is_refused(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    folders = [tmp_path / str(number) for number in range(30)]
    together, held, told = spawn.Barrier(2), spawn.Barrier(2), spawn.Queue()
    both = [spawn.Process(target=claim_at_once, args=(folders, together, held, told)) for _ in range(2)]
    for process in both:
        process.start()
    told_all = (told.get(timeout=200) for _ in range(2 * len(folders)))
    answers = Counter((name, re.sub(r" \(process \d+\)", "", what)) for name, what in told_all)
    for process in both:
        process.join(200)
    refused = "ConfigError: output F: another run is writing to it; wait for it, or choose another output"
    assert answers == Counter((folder.name, what) for folder in folders for what in ("held", refused))


def test_a_finished_run_whose_results_cannot_be_read_keeps_its_settings(tmp_path):
    claim(tmp_path, {"model": "m"})
    (tmp_path / RESULTS).write_text('{"eval')

    def start():
        with claimed(tmp_path, {"model": "m"}):
            read_results(tmp_path)

    for _ in range(2):
        with pytest.raises(FormatError, match=r"results\.json: not valid JSON.*; delete it to repeat the evaluation"):
            start()
        assert sorted(path.name for path in tmp_path.iterdir()) == [RESULTS, SETTINGS]
