"""`flashbone eval` as a user runs it: tables and JSON on stdout, everything else on stderr, killed and resumed."""

import json
import os
import subprocess
import sys

import pytest

from flashbone import cli
from helpers.killed import run_killed
from helpers.tiny_llama import questions, write_tiny_llama

ROWS = [
    {"question": row["prompt"] + " yes" * (number % 3), "answer": f"#### {number}"}
    for number, row in enumerate(questions(24))
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("work")
    write_tiny_llama(folder / "llama")
    for name, rows in (("q", ROWS), ("p", questions(9))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("the cat sat on the mat .\n" * 5)
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


def answers(folder):
    """The answers in a file by their row, without the order in which they came."""
    found = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len({one["row"] for one in found}) == len(found), "a row was answered twice"
    return {one["row"]: one for one in found}


ASKED = ["eval", "llama", "--exact-match", "q.jsonl", "--max-new-tokens", "60", "--batch-size", "3"]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_results(here, capsys):
    assert cli.main([*ASKED, "--output", "whole", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    run_killed([*ASKED, "--output", "killed"], here / "killed.txt")
    assert (here / "killed" / "answers.jsonl").read_bytes().count(b"\n") == 5
    assert not (here / "killed" / "results.json").exists()
    assert cli.main([*ASKED, "--output", "killed", "--json"]) == 0
    captured = capsys.readouterr()
    assert answers(here / "killed") == answers(here / "whole")
    assert json.loads(captured.out)["evaluations"] == whole["evaluations"]
    assert [*answers(here / "killed")] == [*answers(here / "whole")], "in the same order, too"
    assert whole["evaluations"][0]["rows"] == len(ROWS)


def test_a_finished_run_is_printed_again_and_other_settings_are_refused(here, capsys):
    assert cli.main([*ASKED, "--output", "out", "--limit", "4", "--json"]) == 0
    first = capsys.readouterr()
    assert (here / "out" / "results.json").read_text() == first.out
    assert cli.main([*ASKED, "--output", "out", "--limit", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(first.out)
    kept = (here / "out" / "answers.jsonl").read_bytes()
    assert cli.main([*ASKED, "--output", "out", "--limit", "4", "--no-chat-template"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == (
        "flashbone eval: error: output out holds an evaluation with other settings: chat_template was true, is false;"
        " choose another output"
    )
    assert (here / "out" / "answers.jsonl").read_bytes() == kept


def test_changed_data_are_other_settings(here, capsys):
    (here / "few.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    asked = ["eval", "llama", "--exact-match", "few.jsonl", "--max-new-tokens", "2", "--output", "few"]
    assert cli.main(asked) == 0
    (here / "few.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    assert cli.main(asked) == 1
    assert "contents of few.jsonl was" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_shows_each_figure_with_its_interval_and_bars_stay_off_stdout(workplace):
    command = [
        sys.executable,
        "-m",
        "flashbone",
        "eval",
        "llama",
        "--perplexity",
        "text.txt",
        "--exact-match",
        "q.jsonl",
    ]
    done = subprocess.run(
        [*command, "--limit", "3", "--max-new-tokens", "2", "--max-length", "8"],
        cwd=workplace,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    for line in ("text.txt", "loss (nats per token)", "bits per byte", "q.jsonl", "exact match", "0.0000 to 0.5615"):
        assert line in done.stdout
    assert "Loading" not in done.stdout


def test_a_run_that_never_began_leaves_no_folder_behind(here, capsys):
    asked = ["--exact-match", "q.jsonl", "--limit", "2", "--output", "late"]
    assert cli.main(["eval", "./nowhere", *asked]) == 1
    assert cli.main(["eval", "llama", *asked, "--max-new-tokens", "300"]) == 1
    assert not (here / "late").exists()
    assert cli.main(["eval", "llama", *asked, "--max-new-tokens", "2"]) == 0


def test_columns_and_templates_reach_the_model(here, capsys):
    (here / "other.jsonl").write_text(json.dumps({"query": "the cat", "response": "The answer is: 3"}) + "\n")
    common = ["eval", "llama", "--exact-match", "other.jsonl", "--max-new-tokens", "3", "--output"]
    assert cli.main([*common, "plain", "--columns", "question=query,answer=response", "--no-chat-template"]) == 0
    assert cli.main([*common, "chat", "--columns", "question=query,answer=response"]) == 0
    template = ["--prompt", "where was {question} ?"]
    assert (
        cli.main([*common, "ask", "--columns", "question=query,answer=response", "--no-chat-template", *template]) == 0
    )
    texts = {answers(here / name)[0]["text"] for name in ("plain", "chat", "ask")}
    assert len(texts) == 3
    assert answers(here / "plain")[0]["wanted"] == "3"
    capsys.readouterr()
    assert cli.main([*common, "none"]) == 1
    assert "other.jsonl: columns query, response fit no format of task exact_match" in capsys.readouterr().err
    assert not (here / "none").exists()
    assert cli.main([*common, "none", "--columns", "prompt=query"]) == 1
    assert "columns: prompt cannot be renamed, only question, answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nothing to measure"),
        (["--classification", "c", "--perplexity", "p"], "by itself"),
        (["runs/adapter", "--perplexity", "p"], "an adapter is --adapter runs/adapter"),
        (["--perplexity", "p", "--merge"], "--merge needs an --adapter"),
        (["--perplexity", "p", "--num-fewshot", "0"], "--num-fewshot needs --tasks"),
        (["--perplexity", "p", "--no-chat-template"], "--no-chat-template needs --exact-match"),
        (["--exact-match", "q", "--labels", "a,b"], "--labels needs --classification"),
        (["--tasks", "t", "--columns", "a=b"], "--columns needs a file"),
        (["--exact-match", "q", "--prompt", "Q:"], "{question}"),
        (["--exact-match", "q", "--columns", "question"], "OURS=THEIRS"),
        (["--exact-match", "q", "--batch-size", "0"], "1 or more"),
        (["--exact-match", "q", "--limit", "x"], "1 or more"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_a_usage_error(options, said, capsys):
    assert cli.main(["eval", "llama", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["llama", "--perplexity", "nowhere.jsonl"], "nowhere.jsonl: no such data file"),
        (["llama", "--perplexity", "nowhere.txt"], "nowhere.txt: no such data file"),
        (["llama", "--perplexity", "llama"], "llama: is a folder; .jsonl, "),
        (["./nowhere", "--perplexity", "p.jsonl"], "model ./nowhere: no such folder"),
        (["llama", "--perplexity", "p.jsonl", "--adapter", "./no"], "./no: no such folder"),
        (["llama", "--perplexity", "p.jsonl", "--device", "abacus"], "device: got 'abacus'"),
        (["llama", "--perplexity", "p.jsonl", "--columns", "promt=x"], "columns: promt cannot be renamed"),
        (["llama", "--classification", "p.jsonl"], "fit no format of task classification"),
        (["llama", "--exact-match", "q.jsonl", "--max-new-tokens", "300"], "lower max_new_tokens to"),
    ],
)
def test_bad_input_is_one_line_and_code_one(here, options, said, capsys):
    assert cli.main(["eval", *options]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flashbone eval: error:")]
    assert said in line


def test_help_lists_the_command_and_its_options(capsys):
    assert cli.main(["--help"]) == 0
    assert "eval" in capsys.readouterr().out
    assert cli.main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--exact-match", "--tasks", "--classification", "--perplexity", "--output"):
        assert option in text
