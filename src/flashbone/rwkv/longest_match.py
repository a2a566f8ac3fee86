"""Greedy longest match over UTF-8 bytes: from the left, always the longest token that fits.

Two things make it fast in Python, and neither changes the result. An automaton over bytes is one flat dictionary, whose
states below the number of tokens are the tokens themselves. And long texts are first cut, by numpy, between characters
that no token holds side by side: no token can lie across such a cut, so each piece can be matched by itself, and what
the frequent ones (mostly words) consist of is remembered.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from flashbone.rwkv.vocabulary import as_text

# Up to some hundred characters numpy's fixed cost exceeds what it saves (measured on one core, world vocabulary).
_SHORT = 256
_REMEMBERED = 1 << 16  # pieces, each of at most _WORD characters: some 15 MiB
_WORD = 32
_BLOCK = 1 << 20  # characters cut at once
_PAIR_BITS = 22
_NO_CHARACTER = "\U0010ffff"


class LongestMatch:
    """Splits text into the ids of the longest tokens, in time linear in its length.

    `tokens` are given by id: 0 stands for no token and every single byte is one.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tuple(tokens)
        self._steps = automaton(self.tokens)
        self._joined = joined_pairs(self.tokens)
        self._pieces = _Pieces(self)

    def __reduce__(self) -> tuple:
        # What was remembered is left out: pickles, and with them the fingerprints of datasets, depend on tokens only.
        return LongestMatch, (self.tokens,)

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            UnicodeEncodeError: it holds a lone surrogate, which has no UTF-8.
        """
        if len(text) <= _SHORT or self._joined is None:
            return self.encode_bytes(text.encode())
        return list(chain.from_iterable(map(self._pieces.__getitem__, self.cut(text))))

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of a piece, by the automaton alone."""
        step = self._steps.get
        limit = len(self.tokens)
        symbols = [*data, 256]  # 256 ends every match
        end = len(data)
        ids = []
        start = token = 0
        while start < end:
            place = start
            state = 0
            while (state := step(state << 9 | symbols[place])) is not None:
                place += 1
                if state < limit:  # the longest token so far
                    token = state
                    start = place
            ids.append(token)
        return ids

    def cut(self, text: str) -> list[str]:
        """The text in pieces that no token lies across."""
        assert self._joined is not None
        cuts: list[int] = []
        for begin in range(0, len(text), _BLOCK):
            block = text[begin : begin + _BLOCK + 1]
            cuts += (np.flatnonzero(~self._joined[_pair_hashes(block)]) + (begin + 1)).tolist()
        return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


class _Pieces(dict[str, tuple[int, ...]]):
    """The ids of pieces, worked out when they are first asked for."""

    def __init__(self, match: LongestMatch) -> None:
        super().__init__()
        self._match = match

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = tuple(self._match.encode_bytes(piece.encode()))
        if len(piece) <= _WORD:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[piece] = ids
        return ids


def automaton(tokens: Sequence[bytes]) -> dict[int, int]:
    """The trie of the tokens as `state * 512 + byte -> state`: 0 is the root, a token's state is its id, others follow.

    One dictionary of numbers, since nested ones would be 100,000 objects for the garbage collector to visit.
    """
    states = {token: index for index, token in enumerate(tokens)}
    assert states[b""] == 0
    steps: dict[int, int] = {}
    for token in tokens:
        state = states[token]
        for place in range(len(token) - 1, -1, -1):
            before = states.setdefault(token[:place], len(states))
            key = before << 9 | token[place]
            if key in steps:
                break  # another token has led here before
            steps[key] = state
            state = before
    return steps


def joined_pairs(tokens: Sequence[bytes]) -> np.ndarray | None:
    """Marks, by hash, the pairs of characters that some token holds side by side; None if text must not be cut by them.

    A token that is text covers whole characters wherever it matches, so it lies across a cut only if it holds both
    neighbours. One that is not text must not reach from one character into the next at all; none of the world
    vocabulary does. Hashes that collide mark too many pairs, which only makes pieces longer.
    """
    texts = []
    for token in tokens:
        text = as_text(token)
        if text is not None:
            texts.append(text)
        elif any(byte & 0xC0 != 0x80 for byte in token[1:]):
            return None
    joined = np.zeros(1 << _PAIR_BITS, dtype=bool)
    joined[_pair_hashes(_NO_CHARACTER.join(texts))] = True
    return joined


def _pair_hashes(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    mixed = codes[:-1] * np.uint32(0x9E3779B1) ^ codes[1:] * np.uint32(0x85EBCA77)
    return mixed >> np.uint32(32 - _PAIR_BITS)
