"""Every layout of the table: how it is recognised, what is learned of it, and that nothing of a row is lost."""

import json
import re
from pathlib import Path

import pytest
from layout_rows import LAYOUT_ROWS

from flashbone.errors import FormatError
from flashbone.train.data.formats import choose_format, open_examples
from flashbone.train.data.layouts import FORMATS
from golden.write_learned import FILE, learned_text

TRAINING, PREFERENCES = (
    (Path(__file__).parents[2] / "docs" / name).read_text() for name in ("training.md", "preferences.md")
)


def example_of(row, task="sft", **settings):
    reading = open_examples(iter([("d:1", row)]), task, "d", **settings)
    (example,) = reading.examples
    return example


def learned_and_context(example) -> tuple[str, str]:
    """The texts that are learned, and the others."""
    if "conversation" in example:
        talk = json.loads(example["conversation"])
        parts: tuple[list, list] = ([], [talk.get("tools"), talk.get("chat_template_kwargs")])
        for message, is_learned in zip(talk["messages"], talk["learned"], strict=True):
            parts[not is_learned].append(message)
        learned, context = (json.dumps(part).replace("\\n", "\n") for part in parts)
        return learned, context
    return example.get("completion", example.get("text", "")), example.get("prompt", "")


@pytest.mark.parametrize("name", LAYOUT_ROWS)
def test_of_each_layout_the_answers_are_learned_and_all_else_is_context(name):
    layout = LAYOUT_ROWS[name]
    assert choose_format(layout.row, "sft", "d", layout.asked)[0] == layout.format
    learned, context = learned_and_context(example_of(layout.row, asked=layout.asked))
    for text in layout.learned:
        assert text in learned
        assert text not in context
    for text in layout.context:
        assert text in context
        assert text not in learned


def test_every_format_of_the_table_has_a_row():
    assert {layout.format for layout in LAYOUT_ROWS.values()} == {n for n, f in FORMATS.items() if "sft" in f.tasks}


def test_the_golden_text_is_what_is_learned():
    """If this is meant to change: tests/golden/write_learned.py, and look at the difference."""
    assert FILE.read_text(encoding="utf-8") == learned_text()


def table() -> dict[str, tuple[str, str]]:
    """By format: the row that the page shows for it, and its optional columns."""
    rows = re.findall(r"^\| (`[^{|]+?) \| `(\{\W.*?})`[^|]* \| ([^|]*)\|$", TRAINING, re.M)
    return {name: (row, optional.strip()) for names, row, optional in rows for name in re.findall("`([^`]+)`", names)}


def test_the_pages_have_every_format_with_a_row_or_its_columns():
    shown = table()
    assert shown.keys() <= FORMATS.keys()
    for name, entry in FORMATS.items():
        if name not in shown:  # of preferences and rewards
            optional = f"; optional {', '.join(entry.optional)}" if entry.optional else ""
            assert f"| `{name}` | {', '.join(entry.needed)}{optional} | {entry.learned} |" in PREFERENCES.splitlines()
            continue
        example, task = json.loads(shown[name][0]), entry.tasks[0]
        assert shown[name][1] == ", ".join(entry.optional)
        if set(entry.needed) <= example.keys():
            asked = "rwkv" if name == "rwkv" else "auto"  # the one that is taken only when it is named
            assert choose_format(example, task, "d", asked)[0] == name
            assert example_of(example, task, asked=asked)


def test_the_older_forms_of_calls_are_read_as_today_s():
    functions = [{"name": "look", "parameters": {}}]
    turns = [
        {"role": "User", "content": "a"},
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"where": "b"}'}},
        {"role": "function", "name": "look", "content": ""},
        {"role": "Assistant", "content": "c"},
    ]
    talk = json.loads(example_of({"messages": turns, "functions": functions})["conversation"])
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": "b"}}}
    assert talk["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "", "name": "look"},
        {"role": "assistant", "content": "c"},
    ]
    assert talk["tools"] == [{"type": "function", "function": functions[0]}]


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_of_the_last_answers_only_the_last_is_learned(format, turns):
    column = FORMATS[format].needed[0]
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant") * 3]
    (example,) = open_examples(iter([("d:1", {column: talk})]), "sft", "d", turns=turns).examples
    wanted = [False, True] * 3 if turns == "all" else [False] * 5 + [True]
    assert json.loads(example["conversation"])["learned"] == wanted


def test_variables_of_the_chat_template_go_along():
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    row = {"messages": talk, "chat_template_kwargs": {"enable_thinking": False}}
    assert json.loads(example_of(row)["conversation"])["chat_template_kwargs"] == {"enable_thinking": False}


def test_questions_are_asked_with_their_context():
    row = {"context": "a cat sat .", "question": "who ?", "answer": 3}
    assert example_of(row, "exact_match") == {"question": "a cat sat .\n\nwho ?", "answer": "3"}


@pytest.mark.parametrize(
    ("role", "block", "problem"),
    [
        ("user", {"type": "tool_use", "name": "look", "input": {}}, "a turn of the user has a block of type tool_use"),
        ("assistant", {"type": "tool_result", "content": "a"}, "which is the user's"),
        ("user", {"type": "tool_result", "content": "a", "is_error": True}, "has 'is_error', which nothing reads"),
        ("user", {"type": "image", "source": {}}, "a part of type 'image'; only text is read"),
        ("assistant", {"type": "tool_use", "input": {}}, "a call of a tool has no name"),
    ],
)
def test_blocks_that_mean_nothing_here_are_refused_by_row(role, block, problem):
    turns = [
        {"role": "user", "content": "a"},
        {"role": role, "content": [block]},
        {"role": "assistant", "content": "b"},
    ]
    with pytest.raises(FormatError, match=f"d:1: .*{problem}"):
        example_of({"messages": turns})


@pytest.mark.parametrize("answers", [{"text": [], "answer_start": []}, [], {"text": [" "]}, {"text": None}, "a"])
def test_questions_without_an_answer_are_refused(answers):
    with pytest.raises(FormatError, match="d:1: 'answers' is"):
        example_of({"question": "a", "context": "b", "answers": answers})


def test_answers_may_be_a_list_and_their_own_column_goes_first():
    assert example_of({"question": "a", "answers": [{"text": "b"}, {"text": "c"}]})["completion"] == "b"
    assert example_of({"question": "a", "answers": ["b"]})["completion"] == "b"
    assert example_of({"question": "a", "answer": "d", "answers": ["b"]})["completion"] == "d"
