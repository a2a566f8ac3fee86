"""Where the rows of a run come from: one place or several, those of held-out and test rows, and what each holds."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flashbone.errors import ConfigError
from flashbone.files.sources import expanded
from flashbone.train.data.folders import open_dataset
from flashbone.train.data.formats import Reading, check_template, in_template, open_examples
from flashbone.train.data.rows import BadRow, Row, Rows, dataset_rows, local_files, read_rows
from flashbone.train.fields import field_names, section


@dataclass
class DataRecipe:
    """Where the examples come from and how a row becomes one."""

    path: str = ""  # .json, .jsonl, .csv, .parquet, .bin/.idx, or a dataset's hub id or folder
    # held out: a share, a number of rows, another file, where it is and how it is read (path...), or nothing
    eval: int | float | str | dict[str, Any] | None = 0.1
    format: str = "auto"  # of the rows, as in docs/training.md; auto goes by the columns
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the data's name
    split: str = "train"  # also slices: train[:5000]
    subset: str | None = None  # configuration of a hub dataset
    turns: Literal["all", "last"] = "all"  # which answers of a conversation are learned
    drop_unlabelled: bool = False  # leave out rows without a class, which are refused otherwise
    template: str | None = None  # around each prompt, which stands for {prompt} in it
    seed: int | None = None  # of the held-out draw; the run's seed when not given
    allow_cut: bool = False  # train even if training.max_length cuts more than half of the rows
    weight: float = 1.0  # how often the rows appear in an epoch: 2 repeats each, 0.5 draws half of them
    # several places instead of `path`: each a path, or the fields above, which else are those of `data`
    sources: list[str | dict[str, Any]] = field(default_factory=list)
    streaming: bool = False  # read rows while they are learned: for what does not fit on disk


# Rows that are not learned: a share, a number of rows, another file, or where they are and how they are read.
Part = int | float | str | dict[str, Any] | DataRecipe | None

OF_THE_RUN = ("sources", "streaming", "allow_cut")  # fields of `data` that a single source has not


def sources_of(data: DataRecipe) -> list[DataRecipe]:
    """Each place that rows come from, with what `data` sets for all of them; a held-out file of `data` belongs to none.

    Raises:
        ConfigError: a source has an unknown or wrong field, or no path, or `data` has both a path and sources.
    """
    shared = {name: getattr(data, name) for name in field_names(DataRecipe) if name not in OF_THE_RUN}
    shared["eval"] = None if elsewhere(data, data.eval) else data.eval
    if not data.sources:
        return [_place({}, "data", shared)]
    if data.path:
        raise ConfigError(f"data: got path {data.path} and sources, wanted one of them; put the path into sources")
    listed = [{"path": source} if isinstance(source, str) else source for source in data.sources]
    return [_place(fields, f"data.sources, number {n}", shared, OF_THE_RUN) for n, fields in enumerate(listed, 1)]


def _place(
    fields: dict[str, Any], where: str, shared: dict[str, Any] | None = None, refused: Collection[str] = ()
) -> DataRecipe:
    """One place of rows, with fields of its own over shared ones."""
    if names := [name for name in refused if name in fields]:
        raise ConfigError(f"{where}: got {', '.join(names)}, which is for all of data; set it there")
    place = section(DataRecipe, where, {**(shared or {}), **fields})
    if place is None or not place.path:
        raise ConfigError(f"{where}: got no path, wanted a file, a folder or a hub id")
    if place.weight <= 0:
        raise ConfigError(f"{where}.weight: got {place.weight}, wanted a positive number")
    here = {"path": expanded(place.path), "eval": expanded(place.eval) if isinstance(place.eval, str) else place.eval}
    return replace(place, **here)


def elsewhere(data: DataRecipe, held: Part, name: str = "eval") -> DataRecipe | None:
    """The place that `data.<name>` names; None if its rows are drawn from those of `data`, or if it has none."""
    if isinstance(held, dict):
        return _place(held, f"data.{name}", refused=(*OF_THE_RUN, "eval", "weight", "seed"))
    if isinstance(held, str):
        return replace(data, path=held, split="train", sources=[], eval=None)
    return held if isinstance(held, DataRecipe) else None


def named(data: DataRecipe) -> str:
    """The places of the rows, for messages."""
    return ", ".join(place.path for place in sources_of(data))


def holds_out(data: DataRecipe) -> bool:
    """Whether any rows are held out."""
    return elsewhere(data, data.eval) is not None or any(place.eval for place in sources_of(data))


def open_rows(place: DataRecipe, streaming: bool = False) -> tuple[Any, Rows]:
    """What changes when the rows of a place do, and these rows; a stream's are read one by one."""
    if files := local_files(Path(place.path)):
        return [_stamp(file) for file in files], read_rows(Path(place.path))
    dataset = open_dataset(place.path, place.subset, place.split, streaming)
    return getattr(dataset, "_fingerprint", None), dataset_rows(dataset, place.path)


def _stamp(file: Path) -> tuple[str, int, int]:
    """Changes when the file does."""
    try:
        status = file.stat()
    except FileNotFoundError:  # reading raises the error
        return str(file), 0, 0
    return str(file.resolve()), status.st_mtime_ns, status.st_size


def open_place(rows: Iterator[Row | BadRow], place: DataRecipe, task: str, at_once: bool = False) -> Reading:
    """The examples in the rows of a place, with its template around their prompts.

    Raises:
        ConfigError: as `choose_format`; or rows of their format take no template.
        FormatError: as `choose_format`.
    """
    reading = open_examples(
        rows, task, place.path, place.format, place.columns, place.turns, place.drop_unlabelled, at_once
    )
    if place.template is not None:
        check_template(place.template, reading.format)
        reading.examples = in_template(reading.examples, place.template)
    return reading
