"""Scores of single rows, in padded batches: the loss of a row's learned tokens, the class of a row."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = Mapping[str, Tensor]
IGNORED = -100  # a label that no loss is computed of


@torch.no_grad()
def row_losses(
    model: nn.Module, batches: Iterable[Batch], amp: Any = contextlib.nullcontext
) -> Iterator[tuple[float, int]]:
    """The summed cross-entropy of each row's learned tokens (in nats), and how many of them there are.

    Args:
        model: A causal language model, called in eval mode.
        batches: With `input_ids`, `labels` (-100 where nothing is learned) and whatever else the model takes.
        amp: Makes the context in which the model is called, such as one for mixed precision.
    """
    for batch in _in_eval(model, batches):
        labels = batch["labels"][:, 1:]
        with amp():
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
        learned = labels != IGNORED
        # Row by row: the logits of a batch are its largest tensor, and a copy in fp32 would double them.
        for row, wanted, counted in zip(logits, labels, learned, strict=True):
            loss = functional.cross_entropy(row[counted].float(), wanted[counted], reduction="sum")
            yield float(loss), int(counted.sum())


@torch.no_grad()
def row_classes(
    model: nn.Module, batches: Iterable[Batch], amp: Any = contextlib.nullcontext
) -> Iterator[tuple[int, int, float]]:
    """The predicted class of each row, the right one, and the cross-entropy of the right one (in nats).

    Args:
        model: A classifier, called in eval mode.
        batches: With `labels` and whatever else the model takes.
        amp: Makes the context in which the model is called, such as one for mixed precision.
    """
    for batch in _in_eval(model, batches):
        with amp():
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
        losses = functional.cross_entropy(logits, batch["labels"], reduction="none")
        yield from zip(logits.argmax(-1).tolist(), batch["labels"].tolist(), losses.tolist(), strict=True)


def _in_eval(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches on the model's device, with the model in eval mode as long as they last."""
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        for batch in batches:
            yield {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    finally:
        model.train(was_training)


def by_length(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The numbers of the rows, the longest first: what needs most memory is tried at once."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def padded(
    ids: Sequence[Sequence[int]],
    pad: int | None,
    labels: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """A batch for a model: `input_ids` and `attention_mask` of shape (rows, longest), int64, and `labels`.

    Args:
        ids: The rows' tokens.
        pad: The token that fills up; 0 where the tokenizer has none, since the mask hides it.
        labels: As long as the rows each; they become `labels` of shape (rows, longest).
    """
    longest = max(map(len, ids))

    def filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    batch = {"input_ids": filled(ids, pad or 0), "attention_mask": filled([[1] * len(row) for row in ids], 0)}
    if labels is not None:
        batch["labels"] = filled(labels, IGNORED)
    return batch
