"""What both demos need to prepare their files: packages found without importing them, outputs whole or absent."""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class MissingPackage(Exception):
    """A package that carries a model or data is not installed; the message says how to install it."""


def package_folder(module: str, project: str) -> Path:
    """Folder of an installed package, found without running its code (some import what is not installed)."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(
            f"{module} is not installed; run: {sys.executable} -m pip install --no-deps -c constraints.txt {project}"
        )
    return Path(spec.submodule_search_locations[0])


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder` that takes its name on success and disappears on failure.

    A process killed half-way leaves only `NAME.partial`, which the next run throws away.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def once(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill `folder` with `make`, unless an earlier run already did."""
    if folder.is_dir():
        print(f"{folder} is there already")
        return
    with whole_folder(folder) as partial:
        make(partial)
    print(f"wrote {folder}")


def prepare_all(parts: dict[Path, Callable[[Path], None]]) -> int:
    """Fill every folder that is not there yet; 0 if all are there then, 1 (and a line) if a package is missing."""
    try:
        for folder, make in parts.items():
            once(folder, make)
    except MissingPackage as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object a line, in UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file that `write_jsonl` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
