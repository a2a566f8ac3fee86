"""Datasets of the hub and of folders, which the package datasets opens; which files of a folder do not go together."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashbone.errors import ConfigError, one_line, shortened
from flashbone.train.data.rows import BadRow, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

_KINDS = {".json": "JSON", ".jsonl": "JSON", ".csv": "CSV", ".tsv": "CSV", ".parquet": "parquet"}
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def open_dataset(path: str, subset: str | None, split: str, streaming: bool = False) -> "Dataset":
    """A dataset of the hub, or of a folder; with `streaming` one whose rows are read one by one.

    Raises:
        ConfigError: it cannot be loaded, or its rows come from a script.
    """
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        if any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):  # of save_to_disk
            saved = load_from_disk(path)
            splits = {"train": saved} if isinstance(saved, Dataset) else {str(name): saved[name] for name in saved}
            if split not in splits:
                raise ConfigError(f"data.split {split}: {path} has {', '.join(splits)}")
            rows: Any = splits[split]
            return rows.to_iterable_dataset() if streaming else rows
        _refuse_mixed_kinds(Path(path))
        return load_dataset(path, subset, split=split, streaming=streaming)  # pyright: ignore[reportReturnType]
    except ConfigError:
        raise
    except (OSError, ValueError, DatasetsError, RecursionError) as error:
        cause = error.__cause__ or error  # some only report that there was a cause
        if Path(path).is_dir():
            differs = re.search("cast|[Ss]chema|as a scalar of type", str(cause))
            remedy = "write each column alike in all files" if differs else "mend or remove the file"
            reason = _other_columns(Path(path)) or f"{one_line(cause, 200)}; {remedy}"
            raise ConfigError(f"data.path {path} ({split}): the folder cannot be read: {reason}") from None
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise ConfigError(
            f"data.path {path} ({split}): no such file, and no dataset of that id could be loaded: {reason}"
        ) from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        script = str(error).rpartition(" ")[2]
        raise ConfigError(
            f"data.path {path}: its rows come out of a script, {script}, and scripts are never run; "
            "give them as a .jsonl, .csv or .parquet file"
        ) from None


def _data_files(folder: Path) -> list[Path]:
    """The files of rows in a folder, relative to it."""
    names = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.suffix in _KINDS]
    return [name for name in names if name.name not in _DESCRIPTIONS and not str(name).startswith(".")]


def _refuse_mixed_kinds(folder: Path) -> None:
    """Raise ConfigError for a folder with files of several kinds: datasets reads those of one, and tells nobody."""
    kinds = {_KINDS[name.suffix] for name in _data_files(folder)} if folder.is_dir() else set()
    card = folder / "README.md"
    if len(kinds) > 1 and not (card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace")):
        raise ConfigError(
            f"data.path {folder}: holds {' and '.join(sorted(kinds))} files, and only one kind of a folder is read; "
            "name the files in data.sources, or keep one kind"
        )


def _other_columns(folder: Path) -> str:
    """Which files of a folder have other columns than its first; blank if none has."""
    columns: dict[Path, dict[str, Any]] = {}
    for name in _data_files(folder):
        first = next((row for row in read_rows(folder / name) if not isinstance(row, BadRow)), None)
        if first is not None and isinstance(first[1], dict):
            columns[name] = first[1]
    names = list(columns)
    others = [name for name in names[1:] if columns[name].keys() != columns[names[0]].keys()]
    listed = [f"{name} has the columns {', '.join(columns[name])}" for name in [*names[:1], *others]]
    if not others:
        return ""
    return f"{shortened(listed, 3, '; ')}; name the files in data.sources, or give all the same columns"
