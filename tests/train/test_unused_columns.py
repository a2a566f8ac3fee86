"""Columns and keys that no format reads: named in one notice, refused where they change what is learned."""

import re

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.formats import open_examples
from flashbone.train.data.loading import load_data, load_test_rows
from flashbone.train.recipe import DataRecipe, Recipe

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR = {"prompt": "a", "completion": "b"}


def load(path, **data):
    return load_data(Recipe(model="m", output="o", data=DataRecipe(str(path), **{"eval": None, **data})))


def examples_of(row, **settings):
    return list(open_examples(iter([("d:1", row)]), "sft", "d", **settings).examples)


def notices(caplog):
    return [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]


def test_one_notice_names_all_columns_that_no_row_needs(jsonl, caplog):
    path = jsonl([{**PAIR, "id": 1}, {**PAIR, "source": "x"}, {**PAIR, "id": 2, "": None, "a\nb": 1}])
    for _ in range(2):  # read, and out of the cache
        caplog.clear()
        load(path)
        assert notices(caplog) == [f"data: {path}: columns not used: id, source, '', 'a\\nb'; no format reads them"]


def test_keys_of_turns_and_of_parts_are_named_too(jsonl, caplog):
    parts = [{"type": "text", "text": "a", "cache_control": {}}]
    turns = [{**TALK[0], "content": parts, "timestamp": 1}, {**TALK[1], "id": "x"}]
    load(jsonl([{"messages": turns}]))
    (notice,) = notices(caplog)
    assert "columns not used: messages.timestamp, messages.content.cache_control, messages.id;" in notice


def test_rows_of_which_all_is_used_are_read_without_a_notice(jsonl, caplog):
    load(jsonl([{"messages": TALK, "tools": [], "system": ""}]))
    load_test_rows(jsonl([PAIR], "e.jsonl"), "sft", {})
    assert notices(caplog) == []


def test_evaluation_names_them_too(jsonl, caplog):
    path = jsonl([{"question": "a", "answer": "b", "level": 1}])
    load_test_rows(path, "exact_match", {})
    assert notices(caplog) == [f"{path}: columns not used: level; no format reads them"]


@pytest.mark.parametrize("row", [PAIR, {"text": "a"}, {"messages": TALK}, {"input_ids": [1, 2]}])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", 0),
        ("weight", 0.5),
        ("train", False),
        ("loss", "no"),
        ("mask", [0, 1]),
        ("loss_mask", [[1], [0]]),
        ("sample_weight", 2),
        ("labels", [-100, 3]),
        ("completion_mask", [0, 1]),
        ("mask", True),
        ("ignore", True),
        ("is_trained", False),
    ],
)
def test_marks_of_a_row_that_nothing_reads_are_refused(row, name, value):
    with pytest.raises(FormatError, match=rf"d:1: '{name}' (is .*, which would change what is|leaves tokens out)"):
        examples_of({**row, name: value})


@pytest.mark.parametrize(
    "mark", [{"weight": 1}, {"train": True}, {"mask": [1, 1]}, {"loss": None}, {"labels": "a"}, {"skip": False}]
)
def test_marks_that_leave_all_as_it_is_are_not_refused(mark):
    assert examples_of({**PAIR, **mark}) == [PAIR]


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"weight": 0.5}, "'weight' is 0.5; 0 (not learned) or 1 was wanted"),
        ({"weight": "0"}, "'weight' is '0'; 0 (not learned) or 1 was wanted"),
        ({"train": "no"}, "'train' is 'no'; true or false was wanted"),
        ({"loss_mask": [0]}, "'loss_mask' is of type list ([0]), which would change what is learned"),
        ({"train_detail": [{"begin": 0}]}, "'train_detail' is of type list"),
        ({"mask": True}, "'mask' is of type bool (True), which would change"),
        ({"masked": 1}, "'masked' is of type int (1), which would change"),
        ({"weight": 0}, "no answer of the conversation is learned"),
        ({"training": False}, "no answer of the conversation is learned"),
    ],
)
def test_marks_of_a_turn_are_understood_or_refused(mark, message):
    with pytest.raises(FormatError) as error:
        examples_of({"messages": [TALK[0], {**TALK[1], **mark}]})
    assert message in str(error.value)


def test_a_user_s_turn_that_is_to_be_learned_is_refused():
    with pytest.raises(FormatError, match="turn 1: 'train' is true, but only the assistant's turns are learned"):
        examples_of({"messages": [{**TALK[0], "train": True}, TALK[1]]})


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({**PAIR, "context": "c"}, "context"),
        ({**PAIR, "history": [["q", "a"]]}, "history"),
        ({"query": "a", "response": "b", "tools": ["t"]}, "tools"),
        ({"instruction": "a", "output": "b", "context": "c"}, "context"),
        ({"messages": TALK, "documents": ["d"]}, "documents"),
        ({"query": "a", "response": "b", "passage": "s"}, "passage"),
        ({"question": "a", "answer": "b", "choices": ["b", "c"]}, "choices"),
        ({"messages": TALK, "available_tools": [{"name": "f"}]}, "available_tools"),
    ],
)
def test_what_an_answer_may_depend_on_is_refused_unless_columns_are_named(row, name):
    with pytest.raises(FormatError, match=rf"d:1: format .* does not read '{name}', which the answer may depend on"):
        examples_of(row)
    assert examples_of({**row, name: None}) == examples_of({k: v for k, v in row.items() if k != name})


def test_answers_that_are_marked_as_bad_are_refused():
    with pytest.raises(FormatError, match="d:1: 'label' is false, which marks an answer that is not wanted"):
        examples_of({**PAIR, "label": False})
    assert examples_of({**PAIR, "label": True}) == [PAIR]
    assert examples_of({"text": "a", "label": False}) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"text": "a", "role": "prompter", "parent_id": None},
            "'role' is 'prompter': the columns are one message a row",
        ),
        ({"text": "a", "code": "b", "task_id": 1}, "'text' would be learned, and 'code' left out; set data.columns"),
        ({"text": "a", "image": "a.jpg"}, "'image': only text is read"),
        (
            {"text": "a", "prompt": "b"},
            "'text' would be learned, and 'prompt' left out; set data.columns: {prompt: prompt",
        ),
        (
            {**PAIR, "rationale": "r"},
            "'rationale' would be left out; set data.columns: {question: ..., reasoning: rati",
        ),
        ({"text": "a", "summary": "b"}, "completion: summary}, or {text: text} to learn the text alone"),
        ({**PAIR, "images": ["a.jpg"]}, "'images': only text is read"),
        ({"question": "a", "answers": [{"text": "b", "score": 1}]}, "'answers' has 'score', which nothing reads"),
    ],
)
def test_rows_that_are_more_than_their_text_are_refused_with_what_to_do(row, problem):
    """OpenAssistant's messages, MBPP's code, summaries, pictures, answers with votes."""
    with pytest.raises(FormatError, match=re.escape(problem)):
        examples_of(row)


def test_a_text_is_learned_beside_what_describes_it_or_where_it_is_named():
    assert examples_of({"text": "a", "label": 1, "role": "poet", "summary": " "}) == [{"text": "a"}]
    assert examples_of({"text": "Q: b A: a", "question": "b"}) == [{"text": "Q: b A: a"}]
    assert examples_of({"text": "a", "code": "b"}, columns={"text": "text"}) == [{"text": "a"}]
    assert examples_of({"text": "a", "code": "b"}, columns={"prompt": "text", "completion": "code"}) == [
        {"prompt": "a", "completion": "b"}
    ]


@pytest.mark.parametrize(
    ("task", "row", "problem"),
    [
        ("kto", {"prompt": "a", "chosen": "b", "rejected": "c"}, "are pairs: set task: dpo or reward"),
        ("dpo", {"prompt": "a", "completion": "b", "label": True}, "are single answers with a label: set task: kto"),
        ("reward", {"messages": TALK, "label": True}, "are single answers with a label: set task: kto"),
        ("exact_match", {"prompt": "a", "chosen": "b", "rejected": "c"}, "are preferences; a training of task dpo or"),
        ("classification", {"chosen": "b", "rejected": "c"}, "are preferences; a training of task dpo or reward"),
        ("classification", {"tokens": ["a"], "ner_tags": [0]}, "hold a label for each word"),
        ("classification", {"text": "a", "sentence2": "b", "label": 1}, "the class may depend on 'sentence2'"),
        ("classification", {"text": "a", "labels": [0, 1, 1]}, "([0, 1, 1]): several classes of a text (multi-label)"),
    ],
)
def test_rows_of_another_task_are_refused_with_what_to_do(task, row, problem):
    with pytest.raises(FormatError, match=re.escape(problem)):
        list(open_examples(iter([("d:1", row)]), task, "d").examples)


def test_thoughts_between_question_and_answer_are_what_the_model_thinks():
    row = {"query": "a", "thinking": "b", "response": "c"}
    (example,) = examples_of(row)
    assert '"content": "c", "reasoning_content": "b"' in example["conversation"]
    assert "reasoning_content" not in examples_of({**row, "thinking": None})[0]["conversation"]
    columns = {"prompt": "query", "completion": "response"}
    assert examples_of(row, columns=columns) == [{"prompt": "a", "completion": "c"}]


def test_named_columns_leave_the_rest_out(jsonl, caplog):
    path = jsonl([{"q": "a", "a": "b", "context": "c"}])
    assert load(path, columns={"prompt": "q", "completion": "a"}).train.to_list() == [PAIR]
    assert "columns not used: context;" in notices(caplog)[0]
    columns = {"question": "q", "answer": "a", "context": "context"}
    assert load(path, columns=columns).train["prompt"][:] == ["c\n\na"]


def test_named_columns_decide_between_formats_that_fit():
    row = {"messages": TALK, "q": "x", "a": "y"}
    columns = {"prompt": "q", "completion": "a"}
    assert examples_of(row, columns=columns) == [{"prompt": "x", "completion": "y"}]
    with pytest.raises(ConfigError, match=r"data\.columns: format messages does not read prompt, completion; it reads"):
        examples_of(row, asked="messages", columns=columns)


def test_a_named_column_that_no_row_has_is_refused():
    with pytest.raises(FormatError, match=r"d: no row has ctx, which data\.columns names"):
        examples_of({"instruction": "a", "output": "b"}, columns={"input": "ctx"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "tools": [{"name": "f"}]}, "'tools' needs a prompt and a completion that are lists of turns"),
        ({"messages": TALK, "tools": "no JSON"}, "tools is of type str (no JSON); JSON was wanted"),
        ({"messages": TALK, "tools": [3]}, "tools is of type list ([3]); a list of objects was wanted"),
        ({"messages": TALK, "chat_template_kwargs": [1]}, "'chat_template_kwargs' is of type list"),
        ({"messages": [{"role": "system", "content": "x"}, *TALK], "system": "y"}, "'system' differs from the"),
        ({"messages": [{**TALK[0], "content": [{"type": "image_url"}]}, TALK[1]]}, "has a part of type 'image_url'"),
        ({"messages": [{**TALK[0], "content": {"a": 1}}, TALK[1]]}, "turn 1: 'content' is of type dict"),
        ({"messages": [{**TALK[0], "tool_calls": [{"name": "f"}]}, TALK[1]]}, "turn 1: the user calls a tool"),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": [{"id": "1"}]}]}, "a call of a tool has no name"),
        (
            {"messages": [TALK[0], {**TALK[1], "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "the arguments of f is of type str ({); JSON was wanted",
        ),
        ({"messages": ["a\nb", TALK[1]]}, "turn 1 is of type str (a b); an object with role and content was wanted"),
        ({"conversations": [{"from": "gpt"}]}, "turn 1 needs 'from' and 'value'"),
        (
            {"conversations": [{"from": "function_call", "value": "f(x)"}]},
            "turn 1: 'value' is of type str (f(x)); JSON",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["q"]]},
            "'history' is of type list ([['q']]); a list of pairs",
        ),
        ({"instruction": "a", "response": "b", "context": {"c": 1}}, "'context' is of type dict ({'c': 1}); text was"),
    ],
)
def test_what_a_layout_cannot_use_is_refused_by_name(row, message):
    with pytest.raises(FormatError) as error:
        examples_of(row)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "columns", "learned"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "prompt", "completion": "chosen"}, "b"),
        ({"chosen": TALK, "rejected": TALK}, {"messages": "chosen"}, "conversation"),
        ({"input": "a", "preferred_output": "b", "non_preferred_output": "c"}, None, "preferences"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, None, "several completions"),
        ({"role": "user", "content": "a"}, None, "one message a row"),
        ({"translation": {"en": "a", "de": "b"}}, None, "hold languages side by side"),
        ({"question": "a", "choices": ["b"], "answerKey": "A"}, None, "are multiple choice"),
    ],
)
def test_rows_for_other_trainings_are_refused_with_what_to_do(row, columns, learned):
    with pytest.raises(
        FormatError, match=r"d: columns .* (are preferences|hold |are one message|are multiple)"
    ) as error:
        examples_of(row)
    if columns is None:
        assert learned in str(error.value)
    else:
        (example,) = examples_of(row, columns=columns)
        assert learned in (*example, example.get("completion"))
