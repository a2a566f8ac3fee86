"""Thousands of damaged files of every kind, through every command that reads them: `make test-hostile`.

Code 0 or 1, one line of error, nothing written outside OUT, under limits of time and memory. The seeds are the numbers
from 0 on; FLASHBONE_HOSTILE=7 begins at seven million. Without that variable, as in `make test-all`, a fifth is tried.
"""

import importlib
import json
import os
import traceback
from pathlib import Path

import pytest

from hostile.originals import COMMANDS, write
from hostile.trying import attempt, limit_memory, warm_up

pytestmark = pytest.mark.slow
FIRST = 10**6 * int(os.environ.get("FLASHBONE_HOSTILE", "0"))
SHARE = 1 if "FLASHBONE_HOSTILE" in os.environ else 5  # one of so many is tried
COUNTS = {file: count // SHARE for file, (count, _) in COMMANDS.items()}
HEAVY = (
    "transformers",
    "peft",
    "datasets",
    "trl",
    "flashbone.train.run",
    "flashbone.compare.report",
    "flashbone.evaluate.run",
    "flashbone.inspect.model",
)
TAKEN: dict[str, int] = {}  # files that a command read to the end


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    write(folder)
    for name in HEAVY:  # once, not in each child
        importlib.import_module(name)
    return folder


def in_a_child(originals: Path, place: Path, file: str, seeds: range) -> tuple[list[str], int]:
    """What is wrong with the answers, and how many files were taken, tried in a forked process, whose memory is limited
    and whose end is seen."""
    place.mkdir()
    child = os.fork()
    if not child:
        try:
            wrong, taken = warm_up(originals, place, file), 0
            limit_memory()
            for seed in seeds:
                problems, was_taken = attempt(originals, place / "work", file, seed)
                wrong += problems
                taken += was_taken
        except BaseException:
            wrong, taken = [traceback.format_exc()], 0
        (place / "wrong.json").write_text(json.dumps([wrong, taken]))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status or not (place / "wrong.json").exists():
        return [f"{file} {seeds}: the process ended with status {status}"], 0
    return json.loads((place / "wrong.json").read_text())


@pytest.mark.parametrize("file", COMMANDS)
def test_damaged_files_are_read_or_refused_in_one_line(originals, tmp_path, file):
    wrong, TAKEN[file] = in_a_child(originals, tmp_path / "child", file, range(FIRST, FIRST + COUNTS[file]))
    print(f"{file}: {TAKEN[file]} of {COUNTS[file]} were taken", *wrong, sep="\n")
    assert wrong == []


def test_about_half_of_them_are_taken():
    """So that what is damaged is not refused at the door."""
    if TAKEN.keys() != COMMANDS.keys():
        pytest.skip("only some files were tried")
    assert 0.35 < sum(TAKEN.values()) / sum(COUNTS.values()) < 0.65


def test_there_are_over_three_thousand():
    assert sum(count for count, _ in COMMANDS.values()) > 3000
