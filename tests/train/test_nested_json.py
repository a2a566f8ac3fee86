"""Rows of any JSON, against the reader: an example that holds all of the row, or one line; never a traceback."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashbone.errors import FlashboneError
from flashbone.train.data.conversations import KEYS, ROLES
from flashbone.train.data.formats import column_names, open_examples
from flashbone.train.data.marks import CONTEXT, MARKS
from flashbone.train.data.rows import read_rows

NAMES = st.sampled_from(sorted({*column_names("sft"), *column_names("classification"), *CONTEXT, *MARKS}))
TEXTS = (
    st.text(max_size=6)
    | st.text("ab {}\n", min_size=1, max_size=4)
    | st.sampled_from(["{}", "[]", '{"name": "f"}', "\ud800", "a b"])
)
LEAVES = st.none() | st.booleans() | st.integers(-2, 10**30) | st.floats() | TEXTS
ANY = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | TEXTS, inner, max_size=3), max_leaves=8
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}, optional={"more": ANY}), max_size=2)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLES, "bot"]), "content": TEXTS | PARTS | ANY},
    optional=dict.fromkeys(("more", *sorted(KEYS - {"role", "content", "from", "value"})), ANY),
)
ANSWER = st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS | PARTS}, optional={"id": ANY})
TALKS = st.tuples(st.lists(TURNS, min_size=1, max_size=3), ANSWER).map(lambda parts: [*parts[0], parts[1]])
ROWS = st.dictionaries(NAMES | TEXTS, TEXTS | ANY, max_size=4)
CHATS = st.fixed_dictionaries({"messages": TALKS}, optional={"system": TEXTS, "tools": ANY, "more": ANY})
PAIRS = st.fixed_dictionaries({"instruction": TEXTS, "response": TEXTS}, optional={"context": TEXTS, "id": ANY})


def texts_of(value):
    """Every text in a value, keys apart."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_of(inner)
    elif isinstance(value, str) and value.strip():
        yield value


def is_kept(text, example) -> bool:
    """Whether an example holds this text, or what it says as JSON."""
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    return text in example or escaped in example or text in ("{}", "[]", '{"name": "f"}')


def check_nothing_is_lost(row, example, counts):
    assert {*counts.used, *counts.unused} >= set(row)
    whole = "".join(map(str, example.values()))
    for name in counts.used:
        if name in MARKS or name not in row:
            continue
        for turn in row[name] if name in ("messages", "conversations") else [row[name]]:
            said = turn if isinstance(turn, dict) else {"": turn}
            unread = {key.split(".")[1] for key in counts.unused if key.startswith(f"{name}.")}
            for key, value in said.items():
                if key in unread or key in ("role", "from"):
                    continue
                parts = (
                    [part["text"] if isinstance(part, dict) and "text" in part else part for part in value]
                    if key == "content" and isinstance(value, list)
                    else value
                )
                assert all(is_kept(text, whole) for text in texts_of(parts)), (name, key, value)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "classification"])
@given(row=ROWS | CHATS | PAIRS)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_row_of_any_json_is_an_example_or_one_line(tmp_path_factory, task, row):
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    file.write_text(json.dumps(row))
    problem, reading, examples = None, None, []
    try:
        reading = open_examples(read_rows(file), task, str(file))
        examples = list(reading.examples)
    except FlashboneError as error:
        problem = str(error)
    if problem is None:
        check_nothing_is_lost(row, examples[0], reading.counts)
        json.dumps(examples).encode()
    else:
        assert "\n" not in problem
        assert "rows.jsonl" in problem
