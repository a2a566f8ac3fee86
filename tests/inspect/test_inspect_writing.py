"""How names and numbers are written: names that differ in numbers on one line, numbers to three digits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashbone.inspect.writing import broken, group_names, number, percent, size, times


def patterns(names, attribute=lambda name: None):
    return [(group.pattern, len(group.names)) for group in group_names((name, attribute(name)) for name in names)]


def test_layers_are_grouped_in_their_order():
    names = [f"model.layers.{i}.{leaf}" for i in range(32) for leaf in ("self_attn.q_proj", "mlp.fc1")]
    assert patterns([*names, "lm_head"]) == [
        ("model.layers.{0..31}.self_attn.q_proj", 32),
        ("model.layers.{0..31}.mlp.fc1", 32),
        ("lm_head", 1),
    ]


def test_gaps_and_single_numbers_are_shown():
    assert patterns([f"h.{i}.fc" for i in (0, 1, 2, 5, 7, 8)]) == [("h.{0..2,5,7..8}.fc", 6)]
    assert patterns(["h.3.fc", "3", "layer1.fc2"]) == [("h.3.fc", 1), ("3", 1), ("layer1.fc2", 1)]


def test_several_numbers_fold_into_a_product_or_several():
    experts = [f"l.{i}.e.{j}.w" for i in range(2) for j in range(4)]
    assert patterns(experts) == [("l.{0..1}.e.{0..3}.w", 8)]
    assert patterns(experts[:6]) == [("l.0.e.{0..3}.w", 4), ("l.1.e.{0..1}.w", 2)]


def test_layers_that_differ_in_an_attribute_are_apart():
    names = [f"h.{i}.fc" for i in range(4)]
    assert patterns(names, lambda name: name == "h.2.fc") == [("h.{0..1,3}.fc", 3), ("h.2.fc", 1)]


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from("ab"), st.integers(0, 4)), unique=True, min_size=1))
def test_every_name_is_in_exactly_one_group(points):
    names = [f"layers.{i}.{leaf}.{j}.proj" for i, leaf, j in points]
    groups = group_names((name, None) for name in names)
    assert sorted(name for group in groups for name in group.names) == sorted(names)


@given(st.lists(st.from_regex(r"[a-z_0-9]{1,12}", fullmatch=True), min_size=1, max_size=8), st.integers(4, 60))
def test_a_broken_name_is_the_name_in_lines_that_fit(parts, room):
    name = ".".join(parts) + " x 32"
    lines = broken(name, room).split("\n  ")
    assert "".join(lines).replace(" x", "x") == name.replace(" x", "x")
    longest = max(len(part) for part in parts) + 3
    assert all(len(line) <= max(room, longest) for line in lines)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (size(0), "0 bytes"),
        (size(1023), "1,023 bytes"),
        (size(1024), "1.00 KiB"),
        (size(9.996 * 2**10), "10.0 KiB"),
        (size(99.97 * 2**10), "100 KiB"),
        (size(1023 * 2**10), "1,023 KiB"),
        (size(2**20 - 1), "1.00 MiB"),
        (size(26.4 * 2**20), "26.4 MiB"),
        (size(2**40 - 1), "1.00 TiB"),
        (size(2**50), "1,024 TiB"),
        (number(999_999), "999,999"),
        (number(999_999.7), "1.00 M"),
        (number(9_996_000), "10.0 M"),
        (number(13_107_200), "13.1 M"),
        (number(999_499_999), "999 M"),
        (number(999_999_999), "1.00 B"),
        (number(6_738_415_616), "6.74 B"),
        (number(70e9), "70.0 B"),
        (percent(0), "0.00 %"),
        (percent(0.1235), "0.123 %"),
        (percent(1.298), "1.30 %"),
        (percent(99.94), "99.9 %"),
        (percent(99.97), "100 %"),
        (percent(1234.5), "1,234 %"),
        (times("a.b", 1), "a.b"),
        (times("a.{0..3}.b", 4), "a.{0..3}.b x 4"),
    ],
)
def test_numbers_have_three_digits_and_the_unit_that_rounding_reaches(got, want):
    assert got == want
