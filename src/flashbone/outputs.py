"""What runs write: files and folders that appear whole or not at all, and lines of JSON that a kill may cut short."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that a run appends to, none where there is no file; a line that a kill cut short is
    left out."""
    rows = []
    # Not splitlines, which cuts at characters that a text may hold, too.
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
