"""Fields of adapter_config.json: what each may hold, and which modules names and patterns mean."""

from pathlib import Path

import pytest

from flashbone.errors import FormatError
from flashbone.files import fields

SCHEMA = {"r": fields.size(4), "p": fields.PROBABILITY, "f": fields.flag(True), "n": fields.NAMES} | fields.SHARED


@pytest.mark.parametrize(
    ("name", "value", "is_good"),
    [
        *(("r", value, True) for value in (1, 2, 10**9)),
        *(("r", value, False) for value in (0, -1, True, 1.0, "1")),
        *(("p", value, True) for value in (0, 0.0, 0.5, 0.999)),
        *(("p", value, False) for value in (1, 1.0, -0.1, True, False, "0", float("nan"))),
        *(("f", value, value in (True, False)) for value in (True, False, "true")),
        *(("n", value, True) for value in ([], ["a"], ["a", "b.c"])),
        *(("n", value, False) for value in ("a", [""], [1], ["a", "\ud800"])),
        *(("task_type", value, True) for value in (None, "", "CAUSAL_LM")),
        *(("task_type", value, False) for value in (0, ["a"], "\udfff")),
        *(("target_modules", value, True) for value in (None, "", "all-linear", ["q"], [])),
        *(("target_modules", value, False) for value in (0, [1], {"q": 1})),
        *(("layers_to_transform", value, True) for value in (None, 0, 3, -1, [], [0, 1])),
        *(("layers_to_transform", value, False) for value in (True, "0", [True], [0.0])),
        *(("auto_mapping", value, True) for value in (None, {}, {"a": "b", "c": None})),
        *(("auto_mapping", value, False) for value in ([], "a", {"a": 1}, {"a": "\ud800"})),
    ],
)
def test_a_field_holds_what_it_may_and_nothing_else(name, value, is_good):
    if is_good:
        assert fields.checked(Path("file"), {name: value}, SCHEMA)[name] == value
    else:
        with pytest.raises(FormatError, match=rf"^file: {name}: got .*, wanted [^;\n]*$"):
            fields.checked(Path("file"), {name: value}, SCHEMA)


def test_a_missing_or_null_field_has_its_default():
    assert fields.checked(Path("file"), {"r": None, "task_type": None}, SCHEMA) == {
        "r": 4,
        "p": 0.0,
        "f": True,
        "n": [],
        "inference_mode": False,
        "modules_to_save": [],
        "task_type": None,
    }


def test_unknown_fields_are_refused_where_they_are_set_with_all_that_is_wrong():
    fields.checked(Path("file"), {"peft_type": "X", "off": None, "none": [], "zero": 0}, SCHEMA)
    with pytest.raises(FormatError) as caught:
        fields.checked(Path("file"), {"alpha": 2, "r": 0, "beta": "x"}, SCHEMA)
    assert str(caught.value).startswith("file: r: got 0, wanted a positive integer; unknown fields, which may change")
    assert "'alpha': 2, 'beta': 'x'; was it written by a newer version?" in str(caught.value)


def test_a_pattern_compiles_by_itself_and_inside_of_peft_s():
    assert all(map(fields.is_pattern, ("q", ".*q", "^layers\\.0", "(a|b)", "q$")))
    assert not any(map(fields.is_pattern, (None, 3, "", "(", "*", "a{99999999999999}", ["q"], "\ud800")))
    assert not fields.is_pattern("(?P<n>q)(?P<n>q)")
    assert not fields.is_pattern("(?x)q # a comment that takes PEFT's end away\n(")


def test_targets_are_whole_names_endings_after_a_dot_or_everything():
    assert fields.is_targeted("layers.0.q", ["k", "q"])
    assert fields.is_targeted("layers.0.q", ["0.q"])
    assert fields.is_targeted("q", ["q"])
    assert not fields.is_targeted("layers.0.xq", ["q"])
    assert not fields.is_targeted("layers.0.q", [])
    assert fields.is_targeted("layers.0.q", r".*\.q")
    assert not fields.is_targeted("layers.0.q", "q")  # a pattern means the whole name, not its letters
    assert not fields.is_targeted("layers.0.q.x", r".*\.q")
    assert not fields.is_targeted("layers.0.q", "(")
    assert fields.is_targeted("layers.0.q", "all-linear")
    assert fields.is_targeted("layers.0.q", "All-Linear")


def test_the_first_key_of_a_pattern_that_matches_at_the_end_gives_the_size():
    pattern = {"0.q": 2, "q": 3, "^k": 5}
    assert fields.by_pattern("layers.0.q", pattern, 7) == 2
    assert fields.by_pattern("layers.1.q", pattern, 7) == 3
    assert fields.by_pattern("layers.1.qq", pattern, 7) == 7
    assert fields.by_pattern("k", pattern, 7) == 5
    assert fields.by_pattern("layers.1.k", pattern, 7) == 7


def test_a_value_is_shown_on_one_line_a_plain_word_without_quotes():
    assert [fields.shown(value) for value in ("LORA", "a b", None, 3)] == ["LORA", "'a b'", "None", "3"]
    assert "\n" not in fields.shown("a\nb")
    assert len(fields.shown("x " * 1000)) < 60
