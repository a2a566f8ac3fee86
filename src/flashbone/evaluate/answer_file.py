"""An output folder in which answers are kept as they come, so that a run that was killed goes on where it was.

settings.json   what decides the results; a run with other settings is refused
answers.jsonl   one line an answered row, in the order of decoding
results.json    the figures; there when the run has ended
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, TypeVar

from flashbone.errors import ConfigError, FormatError
from flashbone.evaluate.exact_match import Answered
from flashbone.evaluate.results import RESULTS
from flashbone.files.outputs import PARTIAL, alone, make_folder, write_text
from flashbone.files.records import from_json
from flashbone.files.sources import read_json

T = TypeVar("T")

SETTINGS, ANSWERS = "settings.json", "answers.jsonl"


@contextmanager
def claimed(
    folder: Path, settings: dict[str, Any], results: Path | None = None, what: str = "an evaluation"
) -> Iterator[None]:
    """Have the folder for this run alone; where the block fails before its first answer, nothing is left of it.

    Args:
        folder: Where answers are kept.
        settings: What decides the results.
        results: The file that exists when the run has ended; None for results.json in the folder.
        what: What the folder holds, for errors.

    Raises:
        ConfigError: another run has it now; or as `claim` does.
    """
    with alone(folder):
        claim(folder, settings, what)
        try:
            yield
        except BaseException:
            _release(folder, folder / RESULTS if results is None else results)
            raise


def claim(folder: Path, settings: dict[str, Any], what: str = "an evaluation") -> None:
    """Make the folder, or find that it is of a run with the same settings.

    Raises:
        ConfigError: it holds something else, or results of other settings; the first differences are named.
    """
    settings = json.loads(json.dumps(settings))
    make_folder(folder)
    file = folder / SETTINGS
    if not file.exists():
        if any(not path.name.endswith(PARTIAL) for path in folder.iterdir()):
            raise ConfigError(f"output {folder}: holds files, but none of {what}; choose another output")
        write_text(file, json.dumps(settings, indent=2) + "\n")
        return
    before = read_json(file)
    names = [name for name in dict.fromkeys([*before, *settings]) if before.get(name) != settings.get(name)]
    if names:
        parts = [f"{name} was {_short(before.get(name))}, is {_short(settings.get(name))}" for name in names]
        raise ConfigError(
            f"output {folder} holds {what} with other settings: {'; '.join(parts)}; choose another output"
        )


def _release(folder: Path, results: Path) -> None:
    """Leave nothing behind a run that failed before its first answer: the same folder may then hold another."""
    answers = folder / ANSWERS
    if results.exists() or (answers.exists() and answers.stat().st_size):
        return
    for file in (answers, folder / SETTINGS):
        file.unlink(missing_ok=True)


def read_answers(folder: Path, kind: type[T] = Answered) -> list[T]:
    """What was answered before; a last line that a kill cut short is taken off the file.

    Raises:
        FormatError: a complete line is not an answer.
    """
    file = folder / ANSWERS
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    return [_answered(line, f"{file}:{number}", kind) for number, line in enumerate(whole.splitlines(), 1)]


def _answered(line: bytes, where: str, kind: type[T]) -> T:
    try:
        return from_json(kind, dict(json.loads(line)), where)
    except (ValueError, TypeError) as error:  # a FormatError is a ValueError
        raise FormatError(f"{where}: is not an answer of this run ({error}); remove the file") from None


@contextmanager
def appending(folder: Path | None) -> Iterator["Appender"]:
    """Where answers are put as they come; nowhere without a folder."""
    if folder is None:
        yield Appender(None)
        return
    with (folder / ANSWERS).open("a", encoding="utf-8") as file:
        yield Appender(file)


class Appender:
    """Puts answers into a file, each a whole line that is on its way to the disk before the next is computed."""

    def __init__(self, file: TextIO | None):
        self._file = file

    def add(self, answered: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(asdict(answered), ensure_ascii=False) + "\n")
            self._file.flush()


def stamp(*paths: Path) -> str:
    """What changes when the contents of files do: of small ones a digest, of large ones size and time."""
    digest = hashlib.sha256()
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
    for file in files:
        about = file.stat()
        small = about.st_size < 2**26
        digest.update(file.name.encode() + b"\0")
        digest.update(file.read_bytes() if small else repr((about.st_size, about.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
