"""What runs write: files and folders that appear whole or not at all, lines of JSON that a kill may cut short, and a
folder that one run has for itself."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError, FormatError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

PARTIAL = ".partial"  # what the name of a file or folder ends with until it is whole


def write_text(path: Path, text: str) -> None:
    """Write a file beside itself, then rename it into place."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name `path`, in place of another, only when the block ends well."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it gets its name `path` only when the block ends well, and vanishes when it does not."""
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_json_lines(file: Path, after_kill: bool = False) -> list[dict[str, Any]]:
    """The objects of a .jsonl file.

    Args:
        file: What a run appends to.
        after_kill: For a run that goes on: there may be no file yet, and its last line may be half written.

    Raises:
        FormatError: there is no file, or a line of it is broken.
    """
    if not file.exists():
        if after_kill:
            return []
        raise FormatError(f"{file}: no such file; is it the folder of a run?")
    # Not splitlines, which cuts at characters that a text may hold, too.
    *lines, last = file.read_bytes().split(b"\n")
    rows = [_row(line, f"{file}:{number}") for number, line in enumerate(lines, 1)]
    if last:  # a whole line ends with a newline
        try:
            rows.append(_row(last, f"{file}:{len(lines) + 1}"))
        except FormatError:
            if not after_kill:
                raise
    return rows


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON: {error}; remove the line") from None
    if not isinstance(row, dict):
        raise FormatError(f"{where}: wanted a JSON object, got a {type(row).__name__}; remove the line")
    return row


def make_folder(folder: Path) -> None:
    """Make an output folder, if it is not there.

    Raises:
        ConfigError: a file is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"output {folder}: a file is in the way; choose another output") from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder and keep every other run out of it; the system lets go of it however this process ends.

    Where there are no locks, the run goes on with a notice.

    Raises:
        ConfigError: another run has it, or a file is in the way.
    """
    with ExitStack() as held:
        while not _lock(folder, held):  # a run that failed removed it meanwhile
            held.close()
        yield


def _lock(folder: Path, held: ExitStack) -> bool:
    """Lock the folder itself until `held` is closed; False where another folder, or none, has its name by then."""
    make_folder(folder)
    if fcntl is not None:
        try:
            handle = os.open(folder, os.O_RDONLY)
            held.callback(os.close, handle)
            if _flocked(handle, folder):
                return os.path.samestat(os.fstat(handle), folder.stat())
        except FileNotFoundError:
            return False
    log.warning("output %s: there are no locks here; see to it that no other run writes to it", folder)
    return True


def _flocked(handle: int, folder: Path) -> bool:
    """Take the lock; False on a file system without locks."""
    assert fcntl is not None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"output {folder}: another run is writing to it; wait for it, or choose another output"
        ) from None
    except OSError:
        return False
    return True
