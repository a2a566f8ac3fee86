"""The errors that flashbone raises, one subclass for each kind of wrong input; and foreign text as it is shown."""

import re
from collections.abc import Iterable


class FlashboneError(Exception):
    """Root of all errors raised on purpose; the message says where, what was got, what was wanted, and the remedy."""


class ShapeError(FlashboneError, ValueError):
    """A tensor or a layer has sizes that do not fit."""


class FormatError(FlashboneError, ValueError):
    """A file is not what it should be: missing, truncated, of another layout, or with unknown keys."""


class ConfigError(FlashboneError, ValueError):
    """A configuration field is unknown, out of range, or contradicts another."""


class NonFiniteError(FlashboneError, ValueError):
    """A result that is to be written holds NaN or infinity."""


class OutdatedPackageError(FlashboneError, ImportError):
    """Another package is missing, or older than flashbone can work with."""


class BackendError(FlashboneError, RuntimeError):
    """A backend that was asked for by name cannot run: its package is missing, or the tensors are on another device."""


MOST_OF_A_NAME, MOST_OF_AN_ERROR = 200, 500  # characters on a terminal
# What text of several lines may hold besides: white space that moves the cursor over itself alone, and joiners.
LINES = "\n\t\u00a0\u202f\u3000\u200c\u200d"


def visible(text: object, most: int = MOST_OF_A_NAME) -> str:
    """Text of a file or a model as a terminal may show it: one line, control characters and marks of direction as
    escapes, the middle left out where it is long."""
    plain = str(text)
    if len(plain) > 2 * most:
        plain = f"{plain[:most]}...{plain[-most:]}"
    plain = escaped(plain)
    if len(plain) <= most:
        return plain
    end = most // 3
    return f"{plain[: most - end - 3]}...{plain[-end:]}"


def escaped(text: str, keep: str = "") -> str:
    """Text with control characters, marks of direction and the like as escapes, but for those to keep."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shortened(items: Iterable[object], most: int, separator: str = ", ") -> str:
    """The first `most` items as text, and how many more there are."""
    texts = [str(item) for item in items]
    rest = len(texts) - most
    before = " " if separator == ", " else separator
    return separator.join(texts[:most]) + (f"{before}and {rest} more" if rest > 0 else "")


def one_line(message: object, most: int = MOST_OF_AN_ERROR) -> str:
    """A message as one line. Of a long list of clauses or names it keeps the first few, a count, and the last, which is
    the remedy."""
    text = escaped(re.sub(r"\s*[\r\n]+\s*", " ", str(message).strip()))
    for separator in ("; ", ", "):
        text = _first_few(text, separator, most)
    return visible(text, most)


def _first_few(text: str, separator: str, most: int) -> str:
    parts = text.split(separator)
    room = most - len(parts[-1]) - len("and 1000000 more") - 2 * len(separator)
    kept = 0
    while kept < len(parts) and (room := room - len(parts[kept]) - len(separator)) >= 0:
        kept += 1
    left = len(parts) - kept - 1
    if len(text) <= most or kept == 0 or left < 1:
        return text
    return separator.join([*parts[:kept], f"and {left} more", parts[-1]])
