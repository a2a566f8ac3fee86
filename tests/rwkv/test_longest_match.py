"""The longest match of any vocabulary, beside trying every length; test_tokenizer.py has the world vocabulary."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbone.rwkv import longest_match
from flashbone.rwkv.longest_match import LongestMatch

# What no text is, but matches inside it: parts of characters, two of them with the space before.
PARTS = [b"\xe4\xb8", b"\xb8\xad", b"\x96\x87", b" \xe4", b"a\xc3"]
BYTES = [bytes([byte]) for byte in range(256)]


def naive(tokens, data):
    """Greedy longest match by trying every length."""
    ids = {token: index for index, token in enumerate(tokens)}
    found = []
    while data:
        length = next(length for length in range(len(data), 0, -1) if data[:length] in ids)
        found.append(ids[data[:length]])
        data = data[length:]
    return found


@settings(deadline=None, max_examples=300)
@given(
    more=st.sets(st.text("ab é中文", min_size=1, max_size=5).map(str.encode) | st.sampled_from(PARTS)),
    text=st.text("ab é中文ü", max_size=40),
    block=st.integers(1, 9),
)
def test_any_vocabulary_is_matched_greedily(more, text, block):
    tokens = [b"", *BYTES, *sorted(more - set(BYTES))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(longest_match, "_SHORT", 0)
        patch.setattr(longest_match, "_BLOCK", block)
        assert LongestMatch(tokens).encode(text) == naive(tokens, text.encode())


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
def test_text_is_cut_between_characters_that_no_token_holds_side_by_side(monkeypatch, block):
    monkeypatch.setattr(longest_match, "_BLOCK", block)
    match = LongestMatch([b"", *BYTES, b"abc", b" the", "中文".encode(), b"\xe4\xb8"])
    assert match.cut("abcab the中文文 ") == ["abc", "ab", " the", "中文", "文", " "]
    assert match.cut("") == [""]


def test_a_token_from_one_character_into_the_next_forbids_cutting_there():
    tokens = [b"", *BYTES, b"a\xe4", "é".encode()]
    assert LongestMatch(tokens)._joined is None
    text = "a中" * 300
    assert LongestMatch(tokens).encode(text) == naive(tokens, text.encode())


def test_what_is_remembered_is_bounded_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(longest_match, "_REMEMBERED", 3)
    match = LongestMatch([b"", *BYTES, b"abc", b" the", "中文".encode(), b" \xe4"])
    text = " the abc ab 中文 é" * 99
    want = match.encode_bytes(text.encode())
    assert match.encode(text) == want == match.encode(text)
    assert len(match._pieces) <= 3
