"""Outputs: files and folders that appear whole or not at all, lines of JSON that a kill may cut short, and folders that
only one run may write to."""

import errno
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.files.sources import json_object

log = logging.getLogger(__name__)

PARTIAL = ".partial"  # what the name of a file or folder ends with until it is whole
LOCK = f".lock{PARTIAL}"
GIB = 2**30
_FULL, _TAKEN = "no disk space left, free some or write elsewhere", "another run made it meanwhile"
_UNWRITABLE = {errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}
_REASONS = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.ENOTEMPTY: _TAKEN, errno.EEXIST: _TAKEN}


def check(out: Path, size: int, source: Path | None, is_file: bool = False) -> None:
    """Check, before anything is written, that `out` can become a new folder or file of `size` bytes.

    Raises:
        FlashboneError: it exists, lies in the source, or the disk is too full.
    """
    if source is not None and out.resolve().is_relative_to(source.resolve()):
        raise FlashboneError(f"{out}: the output must not be {source} or lie inside it; name another place")
    if out.resolve() == Path.cwd():
        raise FlashboneError(f"{out}: is the current folder, which cannot be replaced; name a new one")
    is_empty_folder = out.is_dir() and not is_file and not any(out.iterdir())
    if out.is_symlink() or (out.exists() and not is_empty_folder):
        raise FlashboneError(f"{out}: exists already; name a new one, or remove it first")
    ancestor = _existing_ancestor(out)
    if not ancestor.is_dir():
        raise FlashboneError(f"{out}: {ancestor} is a file, no folder can be made in it")
    usage = shutil.disk_usage(ancestor)
    if not usage.total:
        raise FlashboneError(f"{out}: {ancestor} is no place for files; name another one")
    if usage.free < size:
        left = f"; a killed run left {', '.join(map(str, leftovers(out)))}, remove it" if leftovers(out) else ""
        raise FlashboneError(
            f"{out}: no disk space left, {size / GIB:.2f} GiB are needed and {usage.free / GIB:.2f} GiB are free{left}"
        )


def leftovers(out: Path) -> list[Path]:
    """Unfinished outputs beside `out`, of runs that were killed or are still writing it."""
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.*{PARTIAL}")) if out.parent.is_dir() else []


def _existing_ancestor(path: Path) -> Path:
    return next(p for p in path.absolute().parents if p.exists())


@contextmanager
def whole_or_absent(out: Path, is_file: bool = False, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `out` to write into, which becomes `out` at the end; an exception removes it.

    Args:
        out: Absent, or an empty folder; absent if `is_file`.
        is_file: Yield the path of a file to write instead, which has the name of `out` unless `replace`.
        replace: `out` may exist, and is replaced at the end; only one run at a time may write it.

    Raises:
        FlashboneError: the disk is full, or another run made `out` meanwhile.
    """
    keep = _existing_ancestor(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}{PARTIAL}" if replace else f".{out.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        if not (is_file and replace):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        if replace:
            yield partial
            _to_disk(partial)
            if not is_file and out.exists():
                shutil.rmtree(out)
            os.replace(partial, out)
        elif is_file:
            file = partial / out.name  # readers go by the suffix, and read it before it gets its place
            yield file
            _to_disk(file)
            _rename_new(file, out)
            partial.rmdir()
        else:
            yield partial
            _to_disk(partial)
            os.rename(partial, out)
        _sync(out.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True) if is_file and replace else shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(out.parent, keep)
        if isinstance(error, OSError) and error.errno in _REASONS:
            raise FlashboneError(f"{out}: {_REASONS[error.errno]}; nothing was written") from error
        raise


def _to_disk(path: Path) -> None:
    """Wait until a file, or a whole folder, is on the disk; otherwise its new name could get there first."""
    if path.is_dir():
        for inner in path.iterdir():
            _to_disk(inner)
    _sync(path)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # cannot be opened there
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # file systems that cannot
            raise
    finally:
        os.close(handle)


def _rename_new(file: Path, out: Path) -> None:
    """Rename a file, never over another; file systems without links cannot tell one that appears at that moment."""
    try:
        os.link(file, out)
    except FileExistsError:
        raise
    except OSError:
        if out.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out)) from None
        os.rename(file, out)
    else:
        file.unlink()


def _remove_empty(folder: Path, keep: Path) -> None:
    """Remove a folder and those around it, as long as they are empty, up to one that was there before."""
    for place in (folder.absolute(), *folder.absolute().parents):
        if place == keep.absolute():
            return
        try:
            place.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole, in place of an older one."""
    with whole_or_absent(path, is_file=True, replace=True) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def read_json_lines(file: Path, after_kill: bool = False) -> list[dict[str, Any]]:
    """The objects of a .jsonl file.

    Args:
        file: What a run appends to.
        after_kill: For a run that resumes: the file may be missing, and its last line half written.

    Raises:
        FormatError: the file is missing, or a line of it is broken.
    """
    if not file.exists():
        if after_kill:
            return []
        raise FormatError(f"{file}: no such file; is it the folder of a run?")
    # Not splitlines, which cuts at characters that a text may hold, too.
    *lines, last = file.read_bytes().split(b"\n")
    remedy = "; remove the line"
    rows = [json_object(line, f"{file}:{number}", remedy) for number, line in enumerate(lines, 1)]
    if last:  # a whole line ends with a newline
        try:
            rows.append(json_object(last, f"{file}:{len(lines) + 1}", remedy))
        except FormatError:
            if not after_kill:
                raise
    return rows


def make_folder(folder: Path) -> None:
    """Make an output folder, unless it exists.

    Raises:
        ConfigError: a file is in the way, or the place takes no folders, as /proc.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"output {folder}: a file is in the way; choose another output") from None
    except FileNotFoundError:
        raise ConfigError(f"output {folder}: no folder can be made there; choose another output") from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder and keep other runs out of it; if it is empty at the end, remove it and the folders made around it.

    The system frees the folder however this process ends. On file systems without locks the run goes on with a notice.

    Raises:
        ConfigError: another run has the folder, or a file is in the way.
    """
    from filelock import FileLock  # takes 0.1 s

    is_the_users = folder.is_dir() and not (folder / LOCK).exists()  # a killed run leaves its lock
    lock, keep = FileLock(folder / LOCK), folder if is_the_users else _existing_ancestor(folder)
    try:
        _take(lock, folder)
        yield
    finally:
        if lock.is_locked:
            with suppress(PermissionError):  # Windows removes no open file
                (folder / LOCK).unlink(missing_ok=True)
            lock.release()
        _remove_empty(folder, keep)


def _process_in(lock: Path) -> str:
    """The number of the process that a lock names; blank if it names none."""
    try:
        return lock.read_text()[:20]
    except (OSError, UnicodeDecodeError):
        return ""


def _take(lock: Any, folder: Path) -> None:
    """Make and lock a folder, and write this process's number into the lock."""
    from filelock import Timeout

    file = folder / LOCK
    before = _process_in(file)
    try:
        while not (lock.is_locked and file.exists()):  # a run that failed may remove the folder meanwhile
            lock.release()
            make_folder(folder)
            with suppress(FileNotFoundError):
                lock.acquire(timeout=0)
        file.write_text(str(os.getpid()))
    except Timeout:
        number = _process_in(file)
        if before and not number:  # filelock below 4.0 empties the file of the run that holds it
            number = before
            with suppress(OSError):
                file.write_text(number)
        process = f" (process {number})" if number else ""  # empty just after the other has taken the lock
        raise ConfigError(
            f"output {folder}: another run is writing to it{process}; wait for it, or choose another output"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise
        log.warning("output %s: this file system has no locks; make sure that no other run writes to it", folder)
