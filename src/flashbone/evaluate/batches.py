"""Rows of tokens in batches: of nearly one length each, padded on the right."""

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100  # a label of which no loss is computed


def by_length(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The numbers of the rows, the longest first: what needs most memory is tried at once."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def padded(
    ids: Sequence[Sequence[int]],
    pad: int | None,
    labels: Sequence[Sequence[int]] | None = None,
    classes: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """A batch for a model: `input_ids` and `attention_mask` of shape (rows, longest), int64, and `labels`.

    Args:
        ids: The rows' tokens.
        pad: The token that fills up; 0 where the tokenizer has none, since the mask hides it.
        labels: As long as the rows each; they become `labels` of shape (rows, longest).
        classes: Or one label a row, of shape (rows,).
    """
    longest = max(map(len, ids))

    def filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    batch = {"input_ids": filled(ids, pad or 0), "attention_mask": filled([[1] * len(row) for row in ids], 0)}
    if labels is not None:
        batch["labels"] = filled(labels, IGNORED)
    if classes is not None:
        batch["labels"] = torch.tensor(classes)
    return batch
