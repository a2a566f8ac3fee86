"""Documents of token ids: cut into windows, drawn and selected whole."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.layouts import Example

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENT = "document"  # the column with the number of a window's document


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
            raise ConfigError(f"training.max_length is {self.length}; wanted at least 2: a token and the next")

    def slices(self, size: int) -> Iterator[slice]:
        """The windows of a document of `size` tokens; none where nothing in it would be learned."""
        length = size if self.length is None else self.length
        for start in range(0, size - self.overlap, max(1, length - self.overlap)):
            yield slice(start, start + length)


def windows_for(args: Any) -> Windows:
    """Windows of the trainer's `max_length`; without overlap where TRL's wrapped packing joins them to a stream."""
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


def count(examples: "Dataset | None") -> int:
    """The number of rows before any was cut into windows."""
    if examples is None:
        return 0
    return len(_starts(examples)) if DOCUMENT in examples.column_names else len(examples)


def select(examples: "Dataset", rows: list[int]) -> "Dataset":
    """The rows of these numbers, with all windows of each."""
    if DOCUMENT not in examples.column_names:
        return examples.select(rows)
    ends = [*_starts(examples), len(examples)]
    return examples.select(np.concatenate([np.arange(ends[row], ends[row + 1]) for row in rows]))


def draw(examples: "Dataset", size: int, seed: int) -> "tuple[Dataset, Dataset]":
    """All rows but `size`, and those; the draw depends on the seed and the number of rows only."""
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


def largest_id(part: "Dataset") -> int:
    """The largest token id of a dataset of windows."""
    batches: Any = part.with_format("arrow").iter(1000)
    ids = (batch["input_ids"].combine_chunks().flatten() for batch in batches)
    return max(int(batch.to_numpy(zero_copy_only=False).max()) for batch in ids)


def _starts(examples: "Dataset") -> np.ndarray:
    """The first window of each document."""
    numbers = examples.select_columns([DOCUMENT]).with_format("numpy")[:][DOCUMENT]
    return np.flatnonzero(np.diff(numbers, prepend=-1))
