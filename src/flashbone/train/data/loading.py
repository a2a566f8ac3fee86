"""Training, held-out and test examples: read, checked with file and line, split, and cut as the trainer wants them."""

import contextlib
import itertools
import logging
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data import windows as token_windows
from flashbone.train.data.counts import RowCounts, split_counts, with_counts
from flashbone.train.data.formats import open_examples
from flashbone.train.data.layouts import FORMATS, Example
from flashbone.train.data.origins import DataRecipe, Part, elsewhere, named, open_place, open_rows, sources_of
from flashbone.train.data.rows import local_files, read_rows, readable
from flashbone.train.data.sources import Source, joined, repeated, without_held_out
from flashbone.train.data.streaming import StreamCounts, check_streaming, streamed
from flashbone.train.data.windows import Windows, count, without_numbers
from flashbone.train.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

CONVERSION = 6  # counts up when the same rows become other examples, so that cached ones are not reused


@dataclass
class Data:
    """What a trainer needs: rows to learn from, rows held out and rows for a last test (if any), and the classes
    (classification)."""

    train: "Dataset"
    eval: "Dataset | None"
    labels: list[str]
    test: "Dataset | None" = None
    sources: list[Source] = field(default_factory=list)
    read: "list[Read]" = field(default_factory=list)  # of each source, then of held-out files
    talks: bool = False  # of a stream: whether it has conversations
    counted: StreamCounts = field(default_factory=StreamCounts)  # of a stream: what became of its rows

    @property
    def conversational(self) -> bool:
        """Whether the rows need a chat template."""
        return self.talks or "conversation" in (self.train.column_names or ())

    @property
    def is_stream(self) -> bool:
        """Whether the training rows are read while they are learned."""
        return not hasattr(self.train, "num_rows")


def load_data(recipe: Recipe, windows: Windows | None = None, test: Part = None) -> Data:
    """Read, check and split the recipe's data.

    Args:
        recipe: Its `data` names the rows.
        windows: What documents of token ids are cut into; they stay whole without it.
        test: Rows for a last test, which are neither learned nor held out: a share, a number of rows, another file, or
            where they are and how they are read.

    Raises:
        FormatError: rows are malformed; the message names the first few with file and line.
        ConfigError: `data` asks for columns, splits or a part that do not exist.
    """
    if recipe.data.streaming:
        return _streamed(recipe, windows or Windows())
    windows, places = windows or Windows(), sources_of(recipe.data)
    loaded = [_read(place, recipe, windows, test) for place in places]
    read: list[Read] = [*loaded]
    held = [[part for part in (source.held_out, source.tested) if part] for source in loaded]
    learned, sources = [], []
    kept = without_held_out([source.learned for source in loaded], held, [place.path for place in places])
    for place, source, rows in zip(places, loaded, kept, strict=True):
        weighted = repeated(rows, place.weight, _seed(place, recipe), place.path)
        counts = count(source.examples), count(source.held_out), count(weighted)
        sources.append(Source(place.path, place.split, source.format, place.weight, *counts))
        learned.append(weighted)
    held_out, tested = [source.held_out for source in loaded], [source.tested for source in loaded]
    for parts, part, name in ((held_out, recipe.data.eval, "eval"), (tested, test, "test")):
        if place := elsewhere(recipe.data, part, name):
            read.append(_load(place, recipe.task, windows))
            parts.append(read[-1].examples)
    train = joined([without_numbers(part) for part in learned])
    assert train is not None
    others = [joined([without_numbers(part) for part in parts if part]) for parts in (held_out, tested)]
    labels = _labels(train, others, named(recipe.data)) if recipe.task == "classification" else []
    data = Data(train, others[0], labels, others[1], sources, read)
    _log(data)
    return data


def _streamed(recipe: Recipe, windows: Windows) -> Data:
    """Rows that are read while they are learned; only held-out rows are stored on disk."""
    check_streaming(recipe)
    rows, formats, talks = streamed(recipe)
    apart = elsewhere(recipe.data, recipe.data.eval)
    held_out = apart and without_numbers(_load(apart, recipe.task, windows).examples)
    log.info("data: %s: read while it is learned; %d rows held out", named(recipe.data), len(held_out or ()))
    places = zip(sources_of(recipe.data), formats, strict=True)
    sources = [Source(place.path, place.split, name, place.weight, 0, 0, 0) for place, name in places]
    return Data(rows, held_out, [], sources=sources, talks=talks)  # pyright: ignore[reportArgumentType]


def _log(data: Data) -> None:
    for source in data.sources if len(data.sources) > 1 else ():
        figures = source.path, source.rows, source.held_out, source.learned, source.weight
        log.info("data: %s: of %d rows %d are held out; %d to learn in an epoch (weight %g)", *figures)
    counts = f", {len(data.test)} to test" if data.test else ""
    log.info("data: %d training rows, %d held out%s", len(data.train), len(data.eval or ()), counts)


def load_test_rows(path: Path, task: str, columns: dict[str, str], limit: int | None = None) -> list[Example]:
    """The rows of a test file as examples, in the order of the file; a .txt file is one text.

    Args:
        path: A .txt file, or a file of rows as `flashbone train` reads them.
        task: sft, classification or exact_match.
        columns: Our names of columns to the file's.
        limit: Read only so many rows.

    Raises:
        FormatError: rows are malformed, or there are none.
        ConfigError: a column does not exist.
    """
    if path.suffix.lower() == ".txt":
        with readable(path):
            text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise FormatError(f"{path}: no text")
        return [{"text": text}]
    with contextlib.closing(read_rows(path)) as rows:
        reading = open_examples(itertools.islice(rows, limit), task, str(path), columns=columns)
        examples = list(reading.examples)
    if reading.format == "images":
        raise FormatError(f"{path}: holds images, and only texts are scored here; hold rows out with data.eval")
    for notice in reading.counts.notices(str(path)):
        log.warning(notice)
    return examples


@dataclass
class Read:
    """The rows of one place.

    Attributes:
        path: of the place.
        format: of its rows.
        counts: of all its rows, whatever `split` selects.
        is_whole: whether `split` selects all that were counted.
        examples: those that it selects; documents of token ids as windows.
    """

    path: str
    format: str
    counts: RowCounts
    is_whole: bool
    examples: "Dataset"


@dataclass
class _Source(Read):
    """The rows of a source, and the parts that they are split into."""

    learned: "Dataset"
    held_out: "Dataset | None"
    tested: "Dataset | None"


def _load(data: DataRecipe, task: str, windows: Windows) -> Read:
    """All examples that `data` names, on disk in datasets' cache, so that they need not fit into memory."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.fingerprint import Hasher

    stamp, source = open_rows(data)
    with contextlib.closing(source) as rows:
        reading = open_place(rows, data, task)
        name, columns = reading.format, reading.columns
        log.info("data: %s is read as %s%s", data.path, name, f" with {columns}" if columns else "")
        is_tokenised = FORMATS[name].is_tokenised

        def generate() -> Iterator[Example]:
            examples = reading.examples
            examples = token_windows.cut(examples, windows, data.path) if is_tokenised else examples
            return with_counts(examples, reading.counts)

        cut = astuple(windows) if is_tokenised else ()
        key = Hasher.hash((CONVERSION, stamp, name, columns, data.turns, data.drop_unlabelled, cut, data.template))
        try:
            examples = Dataset.from_generator(generate, fingerprint=key)
        except DatasetGenerationError as error:
            cause = error.__cause__ or error.__context__
            if isinstance(cause, FormatError | OSError):
                raise cause from None
            raise
    assert isinstance(examples, Dataset)
    examples, counts = split_counts(examples)
    for notice in counts.notices(f"data: {data.path}"):
        log.warning(notice)
    if is_tokenised:
        figures = data.path, count(examples), len(examples), windows.length or "any number of"
        log.info("data: %s: %d documents make %d windows of at most %s tokens", *figures)
    is_whole = not local_files(Path(data.path)) or data.split == "train"
    return Read(data.path, name, counts, is_whole, examples if is_whole else _slice(examples, data))


def _slice(examples: "Dataset", data: DataRecipe) -> "Dataset":
    """The rows that `split` names; a file has one split, called train."""
    from datasets import ReadInstruction

    total = count(examples)
    try:
        parts = ReadInstruction.from_spec(data.split).to_absolute({"train": total})
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"data.split {data.split}: {error}; a file has the split train, as in train[:100]") from None
    rows = [i for part in parts for i in range(part.from_ or 0, total if part.to is None else part.to)]
    if not rows:
        raise ConfigError(f"data.split {data.split}: selects none of the {total} rows of {data.path}")
    return token_windows.select(examples, rows)


def _read(place: DataRecipe, recipe: Recipe, windows: Windows, test: Part) -> _Source:
    """The rows of one source, split by draws that depend only on the seed."""
    loaded = _load(place, recipe.task, windows)
    learned, tested = _draw(loaded.examples, place, recipe, test, "test")
    if apart := elsewhere(place, place.eval):
        return _Source(
            **vars(loaded), learned=learned, held_out=_load(apart, recipe.task, windows).examples, tested=tested
        )
    learned, held_out = _draw(learned, place, recipe, place.eval, "eval")
    return _Source(**vars(loaded), learned=learned, held_out=held_out, tested=tested)


def _draw(
    examples: "Dataset", place: DataRecipe, recipe: Recipe, held: Part, field: str
) -> "tuple[Dataset, Dataset | None]":
    """The rows that stay, and those drawn for `data.<field>`; none are drawn if it names a place of its own."""
    if not held or not isinstance(held, int | float):
        return examples, None
    if held < 0 or (isinstance(held, float) and held >= 1 and not held.is_integer()):
        raise ConfigError(f"data.{field} is {held}; a share below 1, a number of rows, a file or null was wanted")
    total = count(examples)
    drawn = int(held) if held >= 1 else max(1, round(total * held))
    if drawn >= total:
        raise ConfigError(
            f"data.{field} {held} holds out {drawn} of the {total} rows of {place.path}, "
            "which leaves none to learn from; lower it, or set it to null"
        )
    return token_windows.draw(examples, drawn, _seed(place, recipe))


def _seed(place: DataRecipe, recipe: Recipe) -> int:
    return recipe.seed if place.seed is None else place.seed


def _labels(train: "Dataset", others: "list[Dataset | None]", where: str) -> list[str]:
    """The classes in the training rows, sorted, as numbers where all are numbers."""
    labels = sorted(train.unique("label"))
    if all(re.fullmatch("-?[0-9]{1,18}", label) for label in labels):
        labels.sort(key=int)
    if len(labels) < 2:
        raise FormatError(f"{where}: all training rows have the label {labels[0]!r}; two or more classes were wanted")
    unknown = sorted({label for part in others if part for label in part.unique("label")} - set(labels))
    if unknown:
        raise FormatError(
            f"{where}: held-out rows have labels that no training row has: {', '.join(unknown)}; draw others with"
            " data.seed, give held-out rows of their own in data.eval, or leave the class out"
        )
    return labels
