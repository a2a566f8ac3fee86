"""What commands share on the terminal: notices and progress bars on stderr, where results are on stdout."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashbone.errors import one_line

LIBRARIES = r"(transformers|trl|peft|datasets|lm_eval)(\.|$)"
MOST_OF_A_NOTICE = 1000  # characters


class _Notices(logging.StreamHandler):
    """Writes to stderr as it is at the time: who calls a command from Python may put another in its place.

    Where it is closed, there are no notices; one whose reader is gone does not end the command.
    """

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        if self.stream is not None and not getattr(self.stream, "closed", False):
            super().emit(record)


class _OneLine(logging.Formatter):
    """Names and labels in a notice come from files."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record), MOST_OF_A_NOTICE)


def set_up_notices() -> None:
    """Our notices on stderr, from the main process only; no word on what the libraries mean to rename."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=LIBRARIES)
    warnings.filterwarnings("ignore", message=r"Could not find a config file in .*(gguf|\.pth)", category=UserWarning)
    log = logging.getLogger("flashbone")
    main = os.environ.get("RANK", "0") == "0"
    log.setLevel(logging.INFO if main else logging.ERROR)
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if category.__module__.startswith("flashbone."):  # a notice, without the line of code that Python adds
            log.warning("%s", message)
        else:
            shown(message, category, *args, **kwargs)

    if not log.handlers:
        warnings.showwarning = show
        handler = _Notices()
        handler.setFormatter(_OneLine("flashbone: %(message)s"))
        log.addHandler(handler)
        log.propagate = False


def in_colour(word: str, colour: int) -> str:
    """A word for stderr, in an ANSI colour (31 is red, 32 green) where that is a terminal that may have colours."""
    is_shown = sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[{colour}m{word}\033[0m" if is_shown else word


def name_leftovers(command: str, out: Path) -> None:
    """Name what killed runs left beside an output, on stderr."""
    from flashbone.files import outputs

    for leftover in outputs.leftovers(out):
        words = f"{leftover} is left of a run that was killed, or is still under way; remove it if none is"
        print(f"flashbone {command}: {one_line(words)}", file=sys.stderr)


def progress_bars(*columns: Any) -> Any:
    """rich's Progress on stderr, gone when it ends, on terminals only.

    Args:
        columns: Of rich; none for rich's own choice.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def rows_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for so many rows on stderr, where that is a terminal; yields what is called with the rows that are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress_bars(*columns) as progress:
        task = progress.add_task(title, total=total)
        yield lambda rows: progress.advance(task, rows)
