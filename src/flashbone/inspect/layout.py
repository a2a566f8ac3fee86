"""Tables whose first column holds dotted names, broken where their parts end so that they fit the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

SHORTEST = 24  # columns that names get at least
_INDENT = "  "


def name_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], columns: int, footer: Sequence[str] | None = None
) -> Table:
    """A table for a terminal of so many columns; cells but those of the first column are flush right, unbroken."""
    lines = [headers, *rows, *([footer] if footer else [])]
    widths = [max(len(part) for line in lines for part in line[i].split("\n")) for i in range(1, len(headers))]
    room = max(SHORTEST, columns - sum(widths) - 3 * len(widths) - 2)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_footer=footer is not None)
    for i, header in enumerate(headers):
        how = {"justify": "right", "no_wrap": True} if i else {"overflow": "fold"}
        table.add_column(header, Text(footer[i]) if footer else "", **how)  # pyright: ignore[reportArgumentType]
    for names, *cells in rows:
        table.add_row(Text(broken(names, room)), *map(Text, cells))
    return table


def broken(name: str, room: int) -> str:
    """A dotted name in lines of at most `room` columns, as far as its parts allow: broken before a dot, or at a space
    that stands before ` x 32`."""
    lines = [""]
    for part in re.findall(r" x \d+$|[.]?[^. ]+(?:[.][.][^. ]+)*", name):
        indent = len(_INDENT) if len(lines) > 1 else 0
        if lines[-1] and indent + len(lines[-1]) + len(part) > room:
            lines.append(part.lstrip(" "))
        else:
            lines[-1] += part
    return f"\n{_INDENT}".join(lines)
