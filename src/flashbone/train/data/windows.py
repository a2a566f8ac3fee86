"""Examples that are token ids: cut into windows, drawn by document, held against the model's vocabulary."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.formats import Example
from flashbone.train.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENT = "document"  # the column with the number of the document that a window is from


@dataclass(frozen=True)
class Windows:
    """How long the windows of a document are, and how many tokens each shares with the one before.

    The first token of a window is context only. With an overlap of one, each token of a document but its first is
    learned in exactly one window; without any, the windows in their order are the document.
    """

    length: int | None = None  # None: documents stay whole
    overlap: int = 1

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 2:
            raise ConfigError(f"training.max_length is {self.length}; 2 or more was wanted: one token and the next")

    def slices(self, size: int) -> Iterator[slice]:
        """The windows of a document of `size` tokens; none where nothing in it would be learned."""
        length = size if self.length is None else self.length
        for start in range(0, size - self.overlap, max(1, length - self.overlap)):
            yield slice(start, start + length)


def windows_for(args: Any) -> Windows:
    """Windows of the trainer's `max_length`; whole ones of the stream where TRL's wrapped packing makes one of it."""
    wrapped = getattr(args, "packing", False) and args.packing_strategy == "wrapped"
    return Windows(getattr(args, "max_length", None), 0 if wrapped else 1)


def cut(documents: Iterable[Example], windows: Windows, where: str) -> Iterator[Example]:
    """The windows of all documents, with their document's number.

    Raises:
        FormatError: there are none.
    """
    empty = True
    for number, document in enumerate(documents):
        for part in windows.slices(len(document["input_ids"])):
            yield {"input_ids": document["input_ids"][part], DOCUMENT: number}
            empty = False
    if empty:
        raise FormatError(f"{where}: no document has two tokens; one is context, and the next is learned")


def count(examples: "Dataset") -> int:
    """How many rows there are, before any was cut into windows."""
    return len(_starts(examples)) if DOCUMENT in examples.column_names else len(examples)


def select(examples: "Dataset", rows: list[int]) -> "Dataset":
    """The rows of these numbers, with all windows of each."""
    if DOCUMENT not in examples.column_names:
        return examples.select(rows)
    ends = [*_starts(examples), len(examples)]
    return examples.select(np.concatenate([np.arange(ends[row], ends[row + 1]) for row in rows]))


def draw(examples: "Dataset", size: int, seed: int) -> "tuple[Dataset, Dataset]":
    """All rows but `size`, and those; what is drawn depends on the seed and the number of rows only."""
    from datasets import Dataset

    if DOCUMENT not in examples.column_names:
        parts = examples.train_test_split(test_size=size, seed=seed)
        return parts["train"], parts["test"]
    numbers = Dataset.from_dict({"row": list(range(count(examples)))})
    parts = numbers.train_test_split(test_size=size, seed=seed)
    return select(examples, parts["train"]["row"][:]), select(examples, parts["test"]["row"][:])


def without_numbers(part: "Dataset") -> "Dataset":
    """The windows as the trainer wants them."""
    return part.remove_columns(DOCUMENT) if DOCUMENT in part.column_names else part


def _starts(examples: "Dataset") -> np.ndarray:
    """The first window of each document."""
    numbers = examples.select_columns([DOCUMENT]).with_format("numpy")[:][DOCUMENT]
    return np.flatnonzero(np.diff(numbers, prepend=-1))


def accept_tokens(data: Any, args: Any, model: Any, recipe: Recipe) -> None:
    """Check the token ids of `data`, if it holds any, and have TRL take their windows as they are.

    TRL would copy every token twice, to build labels that equal them and to cut what is cut already.

    Raises:
        ConfigError: the model has no embedding for some; on a GPU they would be an assertion in the first step.
    """
    held_out = recipe.data.eval if isinstance(recipe.data.eval, str) else recipe.data.path
    parts = ((data.train, recipe.data.path), (data.eval, held_out), (data.test, "test"))
    given = [(part, where) for part, where in parts if part]
    tokenised = [(part, where) for part, where in given if "input_ids" in part.column_names]
    for part, where in tokenised:
        top, known = _largest(part), model.get_input_embeddings().num_embeddings
        if top >= known:
            raise ConfigError(
                f"data {where}: holds the token id {top}, but the model {recipe.model} has {known} embeddings, "
                f"0 to {known - 1}; was it tokenised for another model?"
            )
    if len(tokenised) == len(given) and not (args.packing or args.eval_packing or args.shuffle_dataset):
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}


def _largest(part: "Dataset") -> int:
    batches: Any = part.with_format("arrow").iter(1000)
    ids = (batch["input_ids"].combine_chunks().flatten() for batch in batches)
    return max(int(batch.to_numpy(zero_copy_only=False).max()) for batch in ids)
