"""How well a classifier sorts texts: accuracy, macro-F1, cross-entropy, and a table of its classes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import DataCollatorWithPadding

from flashbone.errors import FormatError
from flashbone.evaluate.intervals import bootstrap, bootstrap_ratio, wilson
from flashbone.evaluate.results import Evaluation, figure
from flashbone.evaluate.scoring import by_length, row_classes
from flashbone.train.classify import confusion, encoded, macro_f1
from flashbone.train.data.layouts import Example
from flashbone.train.lengths import CLASSIFIED, fitting_length


def classification(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    of: str = "",
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Classify every text.

    Args:
        model: A classifier.
        tokenizer: Its tokenizer.
        examples: Each with `text` and `label`.
        labels: The classes in the order of the head's outputs.
        of: Where the examples are from.
        batch_size: Texts that are classified at once.
        max_length: Tokens of a text that are read; 512 by default, less where the model takes fewer.
        progress: Called with the number of rows of each batch that is done.

    Raises:
        FormatError: a row has another label.
        ConfigError: `max_length` is more than the model takes.
    """
    number = {label: index for index, label in enumerate(labels)}
    unknown = sorted({example["label"] for example in examples} - set(number))
    if unknown:
        raise FormatError(f"{of}: has the labels {', '.join(unknown)}, but the model knows {', '.join(labels)}")
    length = fitting_length(max_length, CLASSIFIED, model.config, tokenizer.model_max_length, "max_length")
    texts = {name: [example.get(name) for example in examples] for name in examples[0] if name != "label"}
    read = encoded(texts, tokenizer, truncation=True, max_length=length)
    ids = read["input_ids"]
    right = np.array([number[example["label"]] for example in examples])
    predicted, losses = np.zeros(len(ids), int), np.zeros(len(ids))
    batches = by_length(ids, batch_size)
    fill = DataCollatorWithPadding(tokenizer)
    made = (
        fill([{**{name: read[name][row] for name in read}, "labels": int(right[row])} for row in rows])
        for rows in batches
    )
    scored = row_classes(model, made)
    for rows in batches:
        for row in rows:
            predicted[row], _, losses[row] = next(scored)
        progress(len(rows))
    return _evaluation(of, labels, right, predicted, losses)


def _evaluation(
    of: str, labels: Sequence[str], right: np.ndarray, predicted: np.ndarray, losses: np.ndarray
) -> Evaluation:
    rows, hits = len(right), int(np.sum(right == predicted))
    counts = confusion(right, predicted, len(labels))
    f1 = bootstrap(lambda drawn: macro_f1(confusion(right[drawn], predicted[drawn], len(labels))), rows)
    figures = [
        figure("accuracy", hits / rows, wilson(hits, rows), "wilson"),
        figure("macro-F1", macro_f1(counts), f1, "bootstrap"),
        figure("cross-entropy (nats)", float(losses.mean()), bootstrap_ratio(losses, np.ones(rows)), "bootstrap"),
    ]
    details = {"classes": _classes(labels, counts), "confusion": counts.tolist()}
    return Evaluation("classification", of, rows, figures, details)


def _classes(labels: Sequence[str], counts: np.ndarray) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class; None where they are not defined."""
    entries = []
    for number, label in enumerate(labels):
        hits, rows, guesses = int(counts[number, number]), int(counts[number].sum()), int(counts[:, number].sum())
        entries.append(
            {
                "label": label,
                "rows": rows,
                "precision": hits / guesses if guesses else None,
                "recall": hits / rows if rows else None,
                "f1": 2 * hits / (rows + guesses) if rows + guesses else None,
            }
        )
    return entries
