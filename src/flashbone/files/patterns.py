"""Regular expressions from adapters' configs, matched in time that grows with the name and the pattern, and no more.

Python's matcher tries every way in which a pattern can match; `(a+)+b` has more of them than it can ever try. Here all
positions at which a part of the pattern may end are followed at once, as the bits of one number. Captures and what
refers back to them are not needed for names of modules.
"""

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from re import error as PatternError
from typing import Any

try:
    from re import _compiler, _parser  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # Python 3.10
    import sre_compile as _compiler  # pyright: ignore[reportMissingImports]
    import sre_parse as _parser  # pyright: ignore[reportMissingImports]

MOST_PATTERNS, LONGEST = 4096, 4096  # patterns of a field, characters of one
_MOST_WAYS, _FEW_WAYS = 12, 2  # a repeat counts two: it gives as many ways as a name is long
_CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_ASSERTS = ("ASSERT", "ASSERT_NOT")


def problem(pattern: str, is_key: bool = False) -> str:
    """Why a pattern is not read; empty if it is. PEFT matches with Python's matcher, so that a pattern with far too
    many ways is refused. `is_key`: PEFT puts it inside another one, where flags and references to groups fail."""
    if len(pattern) > LONGEST:
        return f"longer than {LONGEST} characters"
    try:
        ways, is_odd = _surveyed(pattern)
    except (PatternError, OverflowError, RecursionError) as error:
        return f"not a regular expression ({error})"
    if is_key and is_odd:
        return "a regular expression with flags or references to groups"
    return "" if ways <= _MOST_WAYS else "a regular expression that could take forever to match"


@functools.lru_cache(MOST_PATTERNS)
def _parsed(pattern: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _parser.parse(pattern)


@functools.lru_cache(MOST_PATTERNS)
def _surveyed(pattern: str) -> tuple[int, bool]:
    """A measure of the ways in which it can match, and whether it holds flags or references to groups."""
    parsed, odd = _parsed(pattern), []
    ways = _ways(list(parsed), odd)
    is_odd = bool(odd) or parsed.state.flags != _parser.SRE_FLAG_UNICODE
    return ways + is_odd * _MOST_WAYS // 2, is_odd


def _is_for_python(pattern: str) -> bool:
    ways, is_odd = _surveyed(pattern)
    return is_odd or ways <= _FEW_WAYS


def _ways(parts: list[Any], odd: list[str]) -> int:
    """Each repeat adds two, what is optional one; far too many where one repeat is inside another. `odd` gets what
    positions alone do not tell: references to groups, and flags."""
    count = 0
    for op, value in parts:
        name = str(op)
        if name in _REPEATS:
            low, high, body = value
            inner = _ways(list(body), odd)
            can_nest = inner and high > 1 and not _is_separated(list(body))
            count += _MOST_WAYS + 1 if can_nest else inner + (high > low) + (high > low and high > 1)
        elif (inner := _inner(name, value)) is not None:
            if name == "SUBPATTERN" and (value[1] or value[2]):
                odd.append("flags")
            count += _ways(list(inner), odd)
        elif name == "BRANCH":
            heads = [option[0] if len(option) else None for option in value[1]]
            letters = {head[1] for head in heads if head is not None and str(head[0]) == "LITERAL"}
            count += max(_ways(list(option), odd) for option in value[1]) + (len(letters) < len(heads))
        elif name not in (*_CHARACTERS, "AT"):
            odd.append(name)
    return count


def _is_separated(body: list[Any]) -> bool:
    """Whether a repeated part is one repeat of characters and a letter that these exclude, as `\\w+\\.` is."""
    while len(body) == 1 and (inner := _inner(str(body[0][0]), body[0][1])) is not None:
        body = list(inner)
    if len(body) != 2 or str(body[0][0]) not in _REPEATS or str(body[1][0]) != "LITERAL":
        return False
    repeated = list(body[0][1][2])
    return len(repeated) == 1 and str(repeated[0][0]) in _CHARACTERS and not _letter(repeated[0])(chr(body[1][1]))


def _inner(name: str, value: Any) -> Any:
    """The pattern inside a group or an assertion; None: it is neither."""
    if name == "SUBPATTERN":
        return value[3]
    return value if name == "ATOMIC_GROUP" else value[1] if name in _ASSERTS else None


def fullmatch(pattern: str, name: str) -> bool:
    """Whether a pattern that has no `problem` means the whole name."""
    if _is_for_python(pattern):
        return re.fullmatch(pattern, name) is not None
    return bool(_Walk(pattern, name).ends(1) >> len(name))


def first(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that means the end of the name, from its beginning or after a dot: as PEFT reads
    the keys of a `rank_pattern`."""
    return next((value for pattern, value in patterns.items() if _at_the_end(pattern)(name)), otherwise)


@functools.lru_cache(MOST_PATTERNS)
def _at_the_end(pattern: str) -> Callable[[str], bool]:
    if _is_for_python(pattern):
        compiled = re.compile(rf"(.*\.)?({pattern})$")
        return lambda name: compiled.match(name) is not None

    def walk(name: str) -> bool:
        starts = sum(1 << n for n, before in enumerate("." + name) if before == ".")
        return bool(_Walk(pattern, name).ends(starts) >> len(name))

    return walk


def for_python(pattern: str, names: Iterable[str]) -> str:
    """A pattern that means the same of these names, and that Python's matcher reads in time that grows with them."""
    if _is_for_python(pattern):
        return pattern
    return "|".join(re.escape(name) for name in names if fullmatch(pattern, name)) or "(?!)"


def _letter(part: tuple[Any, Any]) -> Callable[[str], object]:
    """Whether a part of a pattern that means one character means this one."""
    if str(part[0]) == "LITERAL":
        return chr(part[1]).__eq__
    name, value = part
    return _compiled((name, tuple(value) if isinstance(value, list) else value))


@functools.lru_cache(MOST_PATTERNS)
def _compiled(part: tuple[Any, Any]) -> Callable[[str], object]:
    state: Any = _parser.State()
    state.str = ""
    return _compiler.compile(_parser.SubPattern(state, [part]), _parser.SRE_FLAG_UNICODE).fullmatch


class _Walk:
    """A pattern on one name; sets of positions are numbers, bit n for before the n-th character."""

    def __init__(self, pattern: str, name: str) -> None:
        self._parsed, self._name = _parsed(pattern), name
        self._fitting: dict[tuple[str, Any], int] = {}

    def ends(self, starts: int) -> int:
        """Where the pattern may end that starts at any of these positions."""
        return self._all(self._parsed, starts)

    def _all(self, parts: Any, at: int) -> int:
        for op, value in parts:
            at = self._one(str(op), (op, value), at) if at else 0
        return at

    def _one(self, name: str, part: tuple[Any, Any], at: int) -> int:
        value: Any = part[1]
        if name in _CHARACTERS:
            return (at & self._fits(name, value, part)) << 1
        if name in _REPEATS:
            return self._repeat(value, at)
        if name in _ASSERTS:
            return self._assert(name == "ASSERT", value, at)
        if (inner := _inner(name, value)) is not None:
            return self._all(inner, at)
        if name == "BRANCH":
            return functools.reduce(lambda ends, option: ends | self._all(option, at), value[1], 0)
        return at & self._anchors(str(value))

    def _fits(self, name: str, value: Any, part: tuple[Any, Any]) -> int:
        """Before which characters a part that means one character may be."""
        key = (name, id(value) if isinstance(value, list) else value)
        if key not in self._fitting:
            fits = _letter(part)
            self._fitting[key] = sum(1 << n for n, letter in enumerate(self._name) if fits(letter))
        return self._fitting[key]

    def _repeat(self, value: tuple[int, int, Any], at: int) -> int:
        low, high, body = value
        for _ in range(low):
            before, at = at, self._all(body, at)
            if at in (0, before):
                break
        ends, new = at, at
        for _ in range(min(high - low, len(self._name))):
            new = self._all(body, new) & ~ends
            if not new:
                break
            ends |= new
        return ends

    def _anchors(self, kind: str) -> int:
        size = len(self._name)
        if kind.startswith("AT_BEGINNING"):
            return 1
        if kind.startswith("AT_END"):
            return 1 << size
        word = [letter.isalnum() or letter == "_" for letter in self._name]
        edges = sum(1 << n for n, (a, b) in enumerate(zip([False, *word], [*word, False], strict=True)) if a != b)
        return edges if kind == "AT_BOUNDARY" else ~edges & ((2 << size) - 1)

    def _assert(self, wanted: bool, value: tuple[int, Any], at: int) -> int:
        direction, body = value
        width = body.getwidth()[0] if direction < 0 else 0
        holds = 0
        for n in range(at.bit_length()):
            if not at >> n & 1:
                continue
            seen = n >= width and self._all(body, 1 << (n - width))
            if direction < 0:
                seen = seen and seen >> n & 1
            holds |= (bool(seen) == wanted) << n
        return holds
