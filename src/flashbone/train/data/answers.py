"""Answers in texts: the reference's, the model's, and whether they are the same."""

import re
from fractions import Fraction

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
# A minus belongs to a number unless it follows something that it could be subtracted from.
_NUMBER = re.compile(rf"((?:(?<![\w).])[-\u2212])?)\$?\s?((?:(?<=\$)-)?)({_DIGITS})(?:/({_DIGITS}))?")
_HASHES = "####"  # GSM8K
_SAYS = re.compile(r"\bthe (?:final )?answer is:?", re.IGNORECASE)  # MetaMathQA


def wanted_answer(reference: str) -> str:
    """The answer in a reference: the text after `####` or "The answer is:", else all of it."""
    return _after_marker(reference) or reference.strip()


def given_answer(text: str, wanted: str) -> str | None:
    """The answer in a generated text; None where there is none.

    It is the number after the first `####`, or after the last "The answer is", or else the last number of the text.
    Where no number is wanted, it is the text after the marker, or else the whole text.

    Args:
        text: What the model wrote.
        wanted: Of `wanted_answer`.
    """
    marked = _after_marker(text)
    if _only_number(wanted) is None:
        return marked or text.strip() or None
    if marked is not None and (number := _NUMBER.search(marked)):
        return number.group().strip()
    if marked is not None and _HASHES in text:
        return marked or None
    numbers = list(_NUMBER.finditer(text))
    return numbers[-1].group().strip() if numbers else None


def is_same(answer: str | None, wanted: str) -> bool:
    """Whether two answers are the same: as numbers where both are, else as texts but for white space and a last period.

    Commas, currency signs, percent signs and trailing zeros do not count: `$1,200.00` is `1200`.
    """
    if answer is None:
        return False
    numbers = _only_number(answer), _only_number(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _plain(answer) == _plain(wanted)


def _after_marker(text: str) -> str | None:
    """The rest of the line behind the first `####`, else behind the last "The answer is"."""
    if _HASHES in text:
        return _line(text.split(_HASHES, 1)[1])
    markers = list(_SAYS.finditer(text))
    return _line(text[markers[-1].end() :]) if markers else None


def _line(text: str) -> str:
    return text.strip().split("\n", 1)[0].strip()


def _only_number(text: str) -> Fraction | None:
    """The number that a text is, but for a unit of money or percent and a period; None if it is not a number."""
    match = _NUMBER.fullmatch(text.strip().removesuffix(".").strip().removesuffix("%").strip())
    if match is None:
        return None
    before, inner, number, divisor = match.groups()
    value = Fraction(number.replace(",", ""))
    if divisor is not None:
        below = Fraction(divisor.replace(",", ""))
        if not below:
            return None
        value /= below
    return -value if before or inner else value


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").strip()
