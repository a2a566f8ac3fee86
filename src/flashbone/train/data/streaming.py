"""Rows that are read while they are learned, of data sets that do not fit on this disk."""

import contextlib
import itertools
import json
import logging
from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flashbone.errors import ConfigError
from flashbone.train.data.layouts import FORMATS
from flashbone.train.data.origins import DataRecipe, open_place, open_rows, sources_of
from flashbone.train.data.prepared import Counts, Limits, prepare, prepared_rows
from flashbone.train.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

BUFFER = 1000  # rows among which the next is drawn
LOOKED_AT = 200  # rows that are tokenised and checked before the first step
EXAMPLE = "example"  # the column with an example as JSON, since sources may have other columns
SOURCE = "source"  # the column with the number of its source
READ_AHEAD = 10_000  # rows of the trainer whose counts can be taken back


class StreamCounts:
    """What became of the rows of a stream, counted as they are read."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was read to look at it."""
        self.rows, self._totals = 0, Counter[tuple[str, int]]()
        self._last: deque[Counter[tuple[str, int]]] = deque(maxlen=READ_AHEAD)

    def add(self, outcome: "Counter[tuple[str, int]]", is_row: bool = True) -> None:
        """Count a row that the trainer gets, with what was dropped before it: by what became of it, and its source; or,
        at the end, only the latter."""
        self._totals.update(outcome)
        if is_row:
            self.rows += 1
            self._last.append(outcome)

    def of(self, rows: int | None = None) -> "Counter[tuple[str, int]]":
        """The counts of the first `rows`, or of all; loaders read ahead."""
        totals, ahead = Counter(self._totals), self.rows - (self.rows if rows is None else rows)
        for outcome in list(self._last)[len(self._last) - ahead :] if ahead > 0 else ():
            totals.subtract(outcome)
        return totals


def check_streaming(recipe: Recipe) -> None:
    """Raise ConfigError where a recipe with `data.streaming` needs what a stream has not."""
    if not recipe.data.streaming:
        return
    if recipe.task != "sft":
        raise ConfigError(f"data.streaming: is for task sft, not {recipe.task}, which needs all rows; leave it out")
    if (recipe.training.get("max_steps") or 0) <= 0:
        raise ConfigError("data.streaming: a stream has no length; set training.max_steps")
    for place in sources_of(recipe.data):
        if place.eval:
            raise ConfigError(
                f"data.eval: got {place.eval!r}, but of a stream no rows can be held out; give a file of its own, as in"
                " data.eval: held_out.jsonl, or null"
            )
        if not place.split.replace("_", "").isalnum():
            raise ConfigError(f"data.split {place.split}: a stream cannot be sliced; name a whole split")


def streamed(recipe: Recipe) -> "tuple[IterableDataset, list[str], bool]":
    """The examples of all sources, in an order that the seed draws among the next thousand rows; their formats; and
    whether some are conversations. Where there are several sources, each gives rows in proportion to its weight."""
    from datasets import IterableDataset, interleave_datasets

    places = sources_of(recipe.data)
    looks = [_look(place, recipe.task) for place in places]
    streams = [
        IterableDataset.from_generator(_as_json, gen_kwargs={"place": place, "number": number, "task": recipe.task})
        for number, place in enumerate(places)
    ]
    seed = recipe.seed if recipe.data.seed is None else recipe.data.seed
    rows = streams[0]
    if len(streams) > 1:
        total = sum(place.weight for place in places)
        shares = [place.weight / total for place in places]
        rows = interleave_datasets(streams, shares, seed=seed, stopping_strategy="all_exhausted")
    return rows.shuffle(seed=seed, buffer_size=BUFFER), [name for name, _ in looks], any(talks for _, talks in looks)


def _look(place: DataRecipe, task: str) -> tuple[str, bool]:
    """The format of a source, and whether its first row is a conversation; logs what its first rows do not use."""
    with contextlib.closing(open_rows(place, streaming=True)[1]) as rows:
        reading = open_place(rows, place, task, at_once=True)
        if FORMATS[reading.format].is_tokenised:
            raise ConfigError(f"data.streaming: {place.path} holds token ids, which are memory maps; leave it out")
        if reading.format == "images":
            raise ConfigError(f"data.streaming: {place.path} holds images, which are not streamed; leave it out")
        log.info("data: %s is read as %s%s", place.path, reading.format, f" with {c}" if (c := reading.columns) else "")
        first = list(itertools.islice(reading.examples, LOOKED_AT))
    for notice in reading.counts.notices(f"data: {place.path}"):
        log.warning(notice)
    return reading.format, "conversation" in first[0]


def prepare_stream(
    rows: "IterableDataset", tokenizer: Any, limits: Limits, counted: StreamCounts
) -> "tuple[IterableDataset, Counts, Dataset]":
    """The rows as `input_ids` and `labels`; what became of the first few, and these.

    A row with a problem among the later ones ends the run. `counted` is filled while the rows are read.
    """
    from datasets import Dataset, Features, IterableDataset, List, Value

    def tokenised() -> Iterator[dict[str, list[int]]]:
        outcome = Counter[tuple[str, int]]()
        for number, row in enumerate(rows):
            source = row[SOURCE]
            outcome["read", source] += 1
            is_first = True
            for made in prepared_rows(json.loads(row[EXAMPLE]), number, tokenizer, limits):
                flags = {"cut": made["is_cut"], "lost_ends": made["lost_ends"], "empty": made["is_empty"]}
                outcome.update({(name, source): int(count) for name, count in flags.items() if count})
                if made["is_empty"]:
                    continue
                outcome["learned", source] += is_first
                counted.add(outcome)
                outcome, is_first = Counter(), False
                yield {"input_ids": made["input_ids"], "labels": made["labels"]}
        counted.add(outcome, is_row=False)

    first = [json.loads(row[EXAMPLE]) for row in itertools.islice(rows, LOOKED_AT)]
    names = dict.fromkeys(name for example in first for name in example)
    looked_at = Dataset.from_list([{name: example.get(name) for name in names} for example in first])
    _, counts = prepare(looked_at, tokenizer, limits)
    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int64"))})
    return IterableDataset.from_generator(tokenised, features=features), counts, looked_at


def _as_json(place: DataRecipe, number: int, task: str) -> Iterator[dict[str, Any]]:
    with contextlib.closing(open_rows(place, streaming=True)[1]) as rows:
        for example in open_place(rows, place, task, at_once=True).examples:
            yield {EXAMPLE: json.dumps(example), SOURCE: number}
