"""Patterns of configs: matched as Python matches them, or refused where that could take forever."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbone.errors import FormatError
from flashbone.files import fields, patterns

USED = [
    r".*\.layers\.(0|1)\..*(q_proj|v_proj)",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj)$",
    r"(?:.*?(?:vision|image|visual|patch|text|language).*?(?:self_attn|attention|attn|mlp|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)",
    *(r"(?:\w+\.)+q_proj", r"[^.]+\.\d+\.[a-z_]*", "q_proj", "^model.layers.0.mlp", r"a.*b.*c"),
    *(r"(?i)Q_.*", r"(a|b)\.\1", r".*(?<=layers\.)\d+.*", r"\bq\b.*", "()", r"x{2,3}y?", r"[^a-c]*"),
]
ENDLESS = [
    *("(a+)+b", "(a|a)*b", "(a?){30}a{30}", "a?" * 30 + "a" * 30, "(.*a){20}", ".*" * 20 + "x", "((a*)*)*b"),
    *("(aa|a)" * 30, r"(\w+\s?)*$", "(?:a{0,99}){0,99}b", r"(.+)*\1b", "(?=(a+)+b)a", "(?i)(a+)+b", "x" * 5000),
]

leaves = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", "aa", ""])


def combined(inner):
    pairs = st.tuples(inner, inner)
    repeats = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?"])
    return st.one_of(
        pairs.map("".join),
        pairs.map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, repeats).map(lambda part: f"(?:{part[0]}){part[1]}"),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?!{part})"),
        inner.map(lambda part: f"(?<![ab]){part}"),
        inner.map(lambda part: rf"\b{part}$"),
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.recursive(leaves, combined, max_leaves=8), st.lists(st.text("ab.", max_size=7), min_size=1, max_size=20))
def test_a_pattern_that_is_read_matches_as_in_python(pattern, names):
    if patterns.problem(pattern):
        return
    for name in names:
        assert patterns.fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)
        if patterns.problem(pattern, is_key=True):
            continue
        wanted = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert patterns.first({pattern: 1}, name, 0) == wanted
        walk = patterns._Walk(pattern, name)
        assert bool(walk.ends(1) >> len(name)) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize("pattern", USED)
def test_patterns_that_people_use_are_read(pattern):
    assert patterns.problem(pattern) == ""
    names = ["model.layers.0.self_attn.q_proj", "model.visual.0.q_proj", "q_", "a.a", "a..b..c", "xxy", "", "q"]
    for name in names:
        assert patterns.fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_could_take_forever_are_refused_at_once(pattern):
    start = time.process_time()
    assert patterns.problem(pattern)
    schema = fields.SHARED | {"rank_pattern": fields.patterned(fields.is_size, "sizes")}
    for config in ({"target_modules": pattern}, {"exclude_modules": pattern}, {"layers_pattern": [pattern]}):
        with pytest.raises(FormatError, match="could not take forever"):
            fields.checked(Path("file"), config, schema)
    with pytest.raises(FormatError, match="none of which could take forever"):
        fields.checked(Path("file"), {"rank_pattern": {pattern: 1}}, schema)
    for config in ({"target_modules": pattern}, {"alpha_pattern": {pattern: 1}}):
        with pytest.raises(FormatError, match=r"_modules|alpha_pattern"):
            fields.refuse_slow_patterns(Path("file"), config)
    assert time.process_time() - start < 1


def test_what_is_read_is_matched_quickly_on_names_made_for_it():
    start = time.process_time()
    for pattern in (
        ".*" * 6 + "x",
        "a?" * 6 + ".*.*b",
        r"(?:\w+\.)+(?:\w+\.)+x",
        r"(?:[^.]*\.)*(?:[^.]*\.)*(?:[^.]*\.)*x",
    ):
        assert patterns.problem(pattern) == ""
        for name in ("a." * 120, "a" * 250, "." * 250):
            assert not patterns.fullmatch(pattern, name)
            assert patterns.first({pattern: 1}, name, None) is None
    assert time.process_time() - start < 2


def test_too_many_patterns_are_refused_before_any_is_compiled():
    many = {f"layer{n}": 2 for n in range(200_000)}
    start = time.process_time()
    schema = {"rank_pattern": fields.patterned(fields.is_size, "sizes")}
    with pytest.raises(FormatError, match="wanted at most 4,096 regular expressions"):
        fields.checked(Path("file"), {"rank_pattern": many}, schema)
    with pytest.raises(FormatError, match="got 200,000 patterns, wanted at most 4,096"):
        fields.refuse_slow_patterns(Path("file"), {"rank_pattern": many})
    assert time.process_time() - start < 1
