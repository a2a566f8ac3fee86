"""`flashbone generate` as a user runs it: rows on stdout or in a file, killed and gone on with."""

import json
from unittest import mock

import pytest

from flashbone import cli
from helpers.killed import run_killed
from helpers.stand_ins import write_adapter_of
from helpers.tiny_llama import questions, write_tiny_llama


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    write_tiny_llama(folder / "llama")
    write_adapter_of(folder / "llama", folder / "first")
    rows = [{"n": n, **row, "adapter": [None, "first"][n % 2]} for n, row in enumerate(questions(11))]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


FEW = ("--max-new-tokens", "6", "--device", "cpu")
ASKED = ["generate", "llama", "q.jsonl", "--adapter", "first", "--batch-size", "3", *FEW]


def test_rows_come_on_stdout_or_in_a_file_and_a_prompt_as_text(here, capsys):
    assert cli.main([*ASKED, "--limit", "4"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert cli.main([*ASKED, "--limit", "4", "--output", "four.jsonl"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("flashbone generate: 4 rows, ")
    assert [json.loads(line) for line in (here / "four.jsonl").read_text().splitlines()] == printed
    assert [row["n"] for row in printed] == [0, 1, 2, 3]
    assert cli.main(["generate", "first", "--prompt", printed[1]["prompt"], *FEW]) == 0
    assert capsys.readouterr().out == printed[1]["generated"] + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [(), ("--temperature", "2")])
def test_a_killed_run_goes_on_where_it_was_to_the_same_rows(here, sampling):
    name = f"{len(sampling)}"
    asked = [*ASKED, *sampling]
    assert cli.main([*asked, "--output", f"whole{name}.jsonl"]) == 0
    run_killed([*asked, "--output", f"killed{name}.jsonl"], here / f"killed{name}.txt")
    assert not (here / f"killed{name}.jsonl").exists()
    assert (here / f"killed{name}.jsonl.run" / "answers.jsonl").read_bytes().count(b"\n") == 5
    with mock.patch("flashbone.generation.run.log.info") as said:
        assert cli.main([*asked, "--output", f"killed{name}.jsonl"]) == 0
    assert mock.call("%d of %d rows were answered before; going on", 5, 11) in said.mock_calls
    assert (here / f"killed{name}.jsonl").read_bytes() == (here / f"whole{name}.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["llama"], 2, "give FILE or --prompt TEXT, one of the two"),
        (["llama", "q.jsonl", "--prompt", "a"], 2, "give FILE or --prompt TEXT, one of the two"),
        (["llama", "first"], 2, "first is an adapter, not rows; give it as --adapter first"),
        (["llama", "gone.jsonl"], 1, "gone.jsonl: no such data file"),
        (["llama", "q.jsonl"], 1, "q.jsonl:2: 'adapter' is 'first'; wanted null for the base"),
        (["llama", "--prompt", " "], 1, "--prompt: is blank"),
        (["llama", "--prompt", "a", "--max-new-tokens", "0"], 2, "--max-new-tokens: got '0'"),
        (["llama", "--prompt", "the", "--max-new-tokens", "9999"], 1, "lower max_new_tokens to 25"),
    ],
)
def test_what_is_wrong_is_one_line(here, capsys, argv, code, said):
    assert cli.main(["generate", *argv]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err.splitlines()[-1]
