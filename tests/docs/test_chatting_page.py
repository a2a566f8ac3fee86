"""docs/chatting.md runs on tiny models under the names that it uses, and names every option and command."""

import builtins
import itertools
import json
import re

from flashbone.cli import chat, generate
from helpers.pages import ROOT, run_page
from helpers.stand_ins import write_adapter_of, write_rows
from helpers.tiny_llama import questions, write_tiny_llama

PAGE = (ROOT / "docs" / "chatting.md").read_text()


def test_the_page_runs_from_top_to_bottom(place, monkeypatch, capsys):
    write_tiny_llama(place / ".cache/demo/smollm2")
    write_tiny_llama(place / "runs/demo/merged")
    for name in ("demo", "second"):
        write_adapter_of(".cache/demo/smollm2", f"runs/{name}/adapter")
    rows = questions(4)
    write_rows("questions.jsonl", rows)
    write_rows(
        "mixed.jsonl", [row | {"adapter": name} for row, name in zip(rows, (None, "demo", "second", None), strict=True)]
    )
    said = itertools.cycle(["where was the cat ?", "/compare", "/reset", None])

    def line(prompt=""):
        if (text := next(said)) is None:
            raise EOFError
        return text

    monkeypatch.setattr(builtins, "input", line)
    run_page(
        "docs/chatting.md",
        replaced={
            "flashbone chat ": "flashbone chat --max-new-tokens 5 ",
            "flashbone generate ": "flashbone generate --max-new-tokens 5 ",
        },
    )
    for name, source in (("answers", "questions"), ("mixed-answers", "mixed")):
        got = [json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()]
        asked = [json.loads(line) for line in (place / f"{source}.jsonl").read_text().splitlines()]
        assert [{key: row[key] for key in row if not key.startswith("generated")} for row in got] == asked
    assert capsys.readouterr().out.count("┏") == 3


def test_every_option_and_every_command_is_on_the_page():
    parsers = (chat.make_parser(), generate.make_parser())
    options = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    shown = {f"--{name}" for name in re.findall(r"--([a-z][a-z-]+)", PAGE)}
    assert shown == options - {"-h", "--help"}
    commands = set(re.findall(r"^  /(\w+)", chat.EPILOG, re.M)) | {"exit"}
    assert commands == set(re.findall(r"`/(\w+)", PAGE))
