"""Outputs that appear whole or not at all: written to a hidden folder beside, renamed at the end."""

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashbone.errors import FlashboneError

GIB = 2**30
_FULL, _TAKEN = "no disk space left, free some or write elsewhere", "another run made it meanwhile"
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
    free, total = shutil.disk_usage(ancestor).free, shutil.disk_usage(ancestor).total
    if not total:
        raise FlashboneError(f"{out}: {ancestor} is no place for files; name another one")
    if free < size:
        left = f"; a killed run left {', '.join(map(str, leftovers(out)))}, remove it" if leftovers(out) else ""
        raise FlashboneError(
            f"{out}: no disk space left, {size / GIB:.2f} GiB are needed and {free / GIB:.2f} GiB are free{left}"
        )


def leftovers(out: Path) -> list[Path]:
    """Hidden folders of runs that were killed, or that are under way, while they wrote `out`."""
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.*.partial")) if out.parent.is_dir() else []


def _existing_ancestor(path: Path) -> Path:
    return next(p for p in path.absolute().parents if p.exists())


@contextmanager
def whole_or_absent(out: Path, is_file: bool = False) -> Iterator[Path]:
    """Yields an empty folder to write into, which becomes `out` at the end; on any exception nothing is left of it.

    Args:
        out: Absent, or an empty folder.
        is_file: Yield the path of a file to write instead; then `out` is absent.

    Raises:
        FlashboneError: the disk is full.
    """
    keep = _existing_ancestor(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = None
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        staging.chmod(0o777 & ~_umask())
        yield staging / out.name if is_file else staging
        if is_file:
            _rename_new(staging / out.name, out)
            staging.rmdir()
        else:
            os.rename(staging, out)
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        _remove_empty_parents(out, keep)
        if isinstance(error, OSError) and error.errno in _REASONS:
            raise FlashboneError(f"{out}: {_REASONS[error.errno]}; nothing was written") from error
        raise


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


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _remove_empty_parents(out: Path, keep: Path) -> None:
    for parent in out.absolute().parents:
        if parent == keep or any(parent.iterdir()):
            return
        parent.rmdir()
