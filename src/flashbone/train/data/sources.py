"""Several data sets in one run: rows are repeated by weight, kept apart from held-out ones, and joined."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashbone.errors import ConfigError
from flashbone.train.data import windows as token_windows
from flashbone.train.data.windows import DOCUMENT

if TYPE_CHECKING:
    from datasets import Dataset


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What one place of rows brought to a run; a document of token ids counts as one row.

    Attributes:
        rows: that `split` selects; of a stream those that were read.
        held_out: of them, for evaluation.
        learned: in an epoch: the others, times `weight`; of a stream in the run.
    """

    path: str
    split: str
    format: str
    weight: float
    rows: int
    held_out: int
    learned: int


def repeated(examples: "Dataset", weight: float, seed: int, where: str) -> "Dataset":
    """Each row repeated by the whole part of `weight`, and randomly drawn rows for its fraction.

    Raises:
        ConfigError: no row is left.
    """
    if weight == 1:
        return examples
    total = token_windows.count(examples)
    rest = round(weight % 1 * total)
    if not int(weight) and not rest:
        raise ConfigError(f"data {where}: weight {weight} leaves none of its {total} rows; raise it")
    drawn = np.sort(np.random.default_rng(seed).permutation(total)[:rest])
    rows = np.concatenate([np.tile(np.arange(total), int(weight)), drawn])
    return token_windows.select(examples, rows.tolist())


def without_held_out(
    parts: "Sequence[Dataset]", held_out: "Sequence[Sequence[Dataset]]", paths: Sequence[str]
) -> "list[Dataset]":
    """The parts, without rows that another source of the same path holds out; splits may overlap.

    Args:
        parts: What is learned of each source.
        held_out: What is not, of each.
        paths: Of each.
    """
    kept = []
    for number, part in enumerate(parts):
        rivals = [other for other, path in enumerate(paths) if path == paths[number] and other != number]
        keys = {_key(row) for other in rivals for held in held_out[other] for row in held}
        rows = [i for i, row in enumerate(part) if _key(row) not in keys] if keys else range(len(part))
        if len(rows) < len(part):
            log.info("data: source %d: %d rows are held out of another, too", number + 1, len(part) - len(rows))
            part = part.select(rows)
        kept.append(part)
    return kept


def _key(row: Any) -> str:
    return json.dumps({name: value for name, value in row.items() if name != DOCUMENT}, sort_keys=True)


def joined(parts: "Sequence[Dataset]") -> "Dataset | None":
    """The rows of all parts, one part after the other; None if there are no parts."""
    from datasets import concatenate_datasets

    return concatenate_datasets(list(parts)) if len(parts) > 1 else (parts[0] if parts else None)
