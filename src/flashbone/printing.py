"""Tables and lines on a terminal, where text of files and models can neither steer it nor pass for our own output."""

from collections.abc import Iterable
from typing import Any

import rich.console
import rich.table
from rich.segment import Segment
from rich.text import Text

from flashbone.errors import escaped, visible


class Console(rich.console.Console):
    """rich's, on stdout: no markup, and control characters as escapes whatever they are in. A reader that is gone is an
    error like any other, for the command to answer."""

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False, highlight=False)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            shown = segment.control or segment.text.isprintable()
            yield segment if shown else Segment(escaped(segment.text, keep="\n"), segment.style)

    def on_broken_pipe(self) -> None:
        raise  # what rich is handling


class Table(rich.table.Table):
    """rich's, with cells and a title that are `visible`."""

    def __init__(self, *headers: str, title: str | None = None, **looks: Any) -> None:
        super().__init__(*headers, title=None if title is None else Text(visible(title)), **looks)

    def add_row(self, *cells: Any, **looks: Any) -> None:
        super().add_row(*map(_cell, cells), **looks)


def _cell(cell: Any) -> Any:
    """Text as it may be shown; a styled one, which has been made of such, and what rich draws stay as they are."""
    return Text(visible(cell)) if isinstance(cell, str) else cell
