"""Rows of every format become the examples they should, and what is wrong in a row is said."""

import json

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.conversations import answers
from flashbone.train.data.formats import choose_format, converter, open_examples
from flashbone.train.data.layouts import FORMATS, RowFormat
from flashbone.train.data.makers import ALPACA


@pytest.mark.parametrize(
    ("names", "task", "format"),
    [
        (["text"], "sft", "text"),
        (["text", "label"], "sft", "text"),
        (["text", "label"], "classification", "classification"),
        (["prompt", "completion", "id"], "sft", "prompt-completion"),
        (["messages"], "sft", "messages"),
        (["instruction", "input", "output"], "sft", "alpaca"),
        (["instruction", "output"], "sft", "alpaca"),
        (["id", "conversations"], "sft", "sharegpt"),
        (["query", "response"], "sft", "query-response"),
        (["question", "answer"], "sft", "question-answer"),
    ],
)
def test_the_format_is_found_by_the_columns(names, task, format):
    assert choose_format(dict.fromkeys(names, "a"), task, "d") == (format, {})


def test_mapped_columns_decide_the_format_and_fill_it():
    columns = {"prompt": "q", "completion": "a"}
    assert choose_format({"q": "one", "a": "two"}, "sft", "d", columns=columns) == ("prompt-completion", columns)
    assert converter("prompt-completion", columns)({"q": "one", "a": "two"}) == {"prompt": "one", "completion": "two"}


def test_columns_that_fit_nothing_are_listed_with_the_remedy():
    with pytest.raises(FormatError, match=r"d: columns foo, bar fit no format of task sft; .*data\.columns: {prompt"):
        choose_format({"foo": 1, "bar": 2}, "sft", "d")


def test_a_mapping_onto_a_column_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no column 'q' in d, which has query, response"):
        choose_format({"query": "a", "response": "b"}, "sft", "d", columns={"prompt": "q"})
    with pytest.raises(ConfigError, match="'promt' is not a name of task sft"):
        choose_format({"query": "a"}, "sft", "d", columns={"promt": "query"})


def test_a_format_is_one_entry_of_the_table(monkeypatch):
    reversed_text = RowFormat(lambda row: {"text": row["backwards"][::-1]}, ("backwards",))
    monkeypatch.setitem(FORMATS, "backwards", reversed_text)
    reading = open_examples(iter([("d:1", {"backwards": "tac"})]), "sft", "d")
    assert (reading.format, list(reading.examples)) == ("backwards", [{"text": "cat"}])
    with pytest.raises(ConfigError, match=r"got 'forwards', wanted auto, images, messages, .*, backwards"):
        choose_format({"text": "a"}, "sft", "d", "forwards")


def test_alpaca_rows_become_the_prompt_of_the_paper():
    convert = converter("alpaca", {"instruction": "query", "output": "response"})
    row = convert({"query": "Add 1 and 2.", "response": "3"})
    assert row == {"prompt": ALPACA.format(instruction="Add 1 and 2."), "completion": "3"}
    assert row["prompt"].endswith("### Instruction:\nAdd 1 and 2.\n\n### Response:")
    with_input = converter("alpaca", {})({"instruction": "Add.", "input": "1 and 2", "output": "3"})
    assert "### Input:\n1 and 2\n\n### Response:" in with_input["prompt"]


def talk_of(format, row, turns="all"):
    return json.loads(converter(format, {}, turns)(row)["conversation"])


def test_sharegpt_rows_become_conversations():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
    talk = talk_of("sharegpt", {"conversations": turns})
    assert [(m["role"], m["content"]) for m in talk["messages"]] == [("system", "s"), ("user", "h"), ("assistant", "g")]
    assert talk["learned"] == [False, False, True]


def test_every_answer_of_a_conversation_is_learned_or_the_last_alone():
    talk = [{"role": role, "content": str(i)} for i, role in enumerate(["user", "assistant", "user", "assistant"])]
    packed = converter("messages", {})({"messages": talk})["conversation"]
    assert json.loads(packed) == {"messages": talk, "learned": [False, True, False, True]}
    both = [{"prompt": talk[:1], "completion": [talk[1]]}, {"prompt": talk[:3], "completion": [talk[3]]}]
    assert answers(packed) == both
    assert talk_of("messages", {"messages": talk}, "last")["learned"] == [False, False, False, True]


def test_an_opening_line_of_the_assistant_is_context_only():
    talk = [{"role": role, "content": "x"} for role in ["assistant", "user", "assistant"]]
    assert talk_of("messages", {"messages": talk})["learned"] == [False, False, True]


def test_of_a_prompt_and_a_completion_that_are_turns_the_completion_alone_is_learned():
    turns = [{"role": role, "content": "x"} for role in ["user", "assistant", "user", "assistant"]]
    row = {"prompt": turns[:3], "completion": turns[3:]}
    assert talk_of("prompt-completion", row) == {"messages": turns, "learned": [False, False, False, True]}


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("text", [], "holds a list; an object with named columns was wanted"),
        ("text", {"txt": "a"}, "no 'text'; it has txt"),
        ("text", {}, "no 'text'; it has none"),
        ("text", {"text": "  "}, "'text' is blank; text was wanted"),
        ("text", {"text": 5}, r"'text' is of type int \(5\); text was wanted"),
        ("prompt-completion", {"prompt": "a"}, "no 'completion'"),
        ("prompt-completion", {"prompt": "a", "completion": ""}, "'completion' is empty"),
        ("alpaca", {"instruction": "a", "output": "b", "input": 3}, "'input' is of type int"),
        ("messages", {"messages": []}, "the conversation is empty"),
        ("messages", {"messages": [{"role": "user"}]}, "turn 1 needs 'role' and 'content'"),
        ("messages", {"messages": [{"role": "cat", "content": "x"}]}, "turn 1: unknown role 'cat'"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, "must end with the assistant's answer"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "turn 1: 'content' is empty"),
        ("classification", {"text": "a", "label": 1.5}, "'label' is of type float"),
        ("classification", {"text": "a"}, "'label' is None, which marks a row without a class"),
    ],
)
def test_what_is_wrong_in_a_row_is_said(format, row, message):
    with pytest.raises(FormatError, match=message):
        converter(format, {})(row)
