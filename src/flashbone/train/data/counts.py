"""What became of the rows of a source: how many were kept, and which columns were used; notices of what was not."""

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from flashbone.errors import shortened
from flashbone.train.data.conversations import unread_keys
from flashbone.train.data.layouts import Example

if TYPE_CHECKING:
    from datasets import Dataset

COUNTS = "counts"  # a column of cached examples: blank, but for the last one
SHOWN = 12


@dataclass
class RowCounts:
    """What became of rows; filled while they are read.

    Attributes:
        read: How many there were.
        kept: How many became examples.
        dropped: How many were left out on request, by reason.
        used: Columns that were read.
        unused: Columns, and keys of turns such as `messages.id`, that nothing read.
    """

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def see(self, row: dict[str, Any], used: Collection[str], turns: Iterable[str]) -> None:
        """Note the columns of a row, of which `used` are read; the columns `turns` may hold turns."""
        if not row.keys() <= {*self.used, *self.unused}:
            for name in row:
                _add(self.used if name in used else self.unused, name)
        for column in turns:
            for key in unread_keys(row.get(column)):
                _add(self.unused, f"{column}.{key}")

    def drop(self, reason: str) -> None:
        """Count a row that was left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def notices(self, where: str) -> list[str]:
        """What a user has to know: columns that were not used, and rows that were left out."""
        said = [f"{where}: {count} of {self.read} rows left out: {reason}" for reason, count in self.dropped.items()]
        if self.unused:
            said.append(f"{where}: columns not used: {listed(self.unused)}; no format reads them")
        return said


def listed(names: Collection[str]) -> str:
    """The names of columns on one line."""
    return shortened((name if name.isprintable() and name else repr(name) for name in names), SHOWN) or "none"


def _add(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)


def with_counts(examples: Iterable[Example], counts: RowCounts) -> Iterator[Example]:
    """The examples, with the counts at the last one, so that a cache of them has them, too."""
    held: Example | None = None
    for example in examples:
        if held is not None:
            yield {**held, COUNTS: ""}
        held = example
    if held is not None:
        yield {**held, COUNTS: json.dumps(asdict(counts))}


def split_counts(examples: "Dataset") -> "tuple[Dataset, RowCounts]":
    """The examples without their counts, and these."""
    counts = RowCounts(**json.loads(examples[-1][COUNTS]))
    return examples.remove_columns(COUNTS), counts
