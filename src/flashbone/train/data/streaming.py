"""Rows that are read while they are learned, of data sets that do not fit on this disk."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flashbone.errors import ConfigError
from flashbone.train.data.layouts import FORMATS, Example
from flashbone.train.data.origins import DataRecipe, open_place, open_rows, sources_of
from flashbone.train.data.prepared import Counts, Limits, prepare, prepared_rows
from flashbone.train.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUFFER = 1000  # rows among which the next is drawn
LOOKED_AT = 200  # rows that are tokenised and checked before the first step
EXAMPLE = "example"  # the column with an example as JSON, since sources may have other columns


def check_streaming(recipe: Recipe) -> None:
    """Raise ConfigError where a recipe with `data.streaming` needs what a stream has not."""
    if not recipe.data.streaming:
        return
    if recipe.task != "sft":
        raise ConfigError("data.streaming: is for task sft; a classifier needs all rows to know its classes")
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


def streamed(recipe: Recipe) -> "tuple[IterableDataset, bool]":
    """The examples of all sources, in an order that the seed draws among the next thousand rows; and whether some are
    conversations. Where there are several sources, each gives rows in proportion to its weight."""
    from datasets import IterableDataset, interleave_datasets

    places = sources_of(recipe.data)
    has_conversations = ["conversation" in next(_examples(place, recipe.task)) for place in places]
    streams = [
        IterableDataset.from_generator(_as_json, gen_kwargs={"place": place, "task": recipe.task}) for place in places
    ]
    seed = recipe.seed if recipe.data.seed is None else recipe.data.seed
    rows = streams[0]
    if len(streams) > 1:
        total = sum(place.weight for place in places)
        shares = [place.weight / total for place in places]
        rows = interleave_datasets(streams, shares, seed=seed, stopping_strategy="all_exhausted")
    return rows.shuffle(seed=seed, buffer_size=BUFFER), any(has_conversations)


def prepare_stream(
    rows: "IterableDataset", tokenizer: Any, limits: Limits
) -> "tuple[IterableDataset, Counts, Dataset]":
    """The rows as `input_ids` and `labels`; what became of the first few, and these.

    A row with a problem among the later ones ends the run.
    """
    from datasets import Dataset, Features, IterableDataset, List, Value

    def tokenised() -> Iterator[dict[str, list[int]]]:
        for number, row in enumerate(rows):
            yield from prepared_rows(json.loads(row[EXAMPLE]), number, tokenizer, limits)

    first = [json.loads(row[EXAMPLE]) for row in itertools.islice(rows, LOOKED_AT)]
    names = dict.fromkeys(name for example in first for name in example)
    looked_at = Dataset.from_list([{name: example.get(name) for name in names} for example in first])
    _, counts = prepare(looked_at, tokenizer, limits)
    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int64"))})
    return IterableDataset.from_generator(tokenised, features=features), counts, looked_at


def _as_json(place: DataRecipe, task: str) -> Iterator[dict[str, str]]:
    for example in _examples(place, task):
        yield {EXAMPLE: json.dumps(example)}


def _examples(place: DataRecipe, task: str) -> Iterator[Example]:
    """The examples of one source, from its first row on."""
    with contextlib.closing(open_rows(place, streaming=True)[1]) as rows:
        reading = open_place(rows, place, task)
        if FORMATS[reading.format].is_tokenised:
            raise ConfigError(f"data.streaming: {place.path} holds token ids, which are memory maps; leave it out")
        yield from reading.examples
