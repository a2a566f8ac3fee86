"""Text classification: tokenized rows, a Trainer on an adapted model with a new head, accuracy and macro-F1."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flashbone.train.data.loading import Data
from flashbone.train.data.prepared import Counts

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


def classification_trainer(model: Any, args: Any, data: Data, held_out: Any, tokenizer: Any, max_length: int) -> Any:
    """A Trainer on a model that has been adapted, its head included.

    Args:
        model: What trains.
        args: The trainer's.
        data: The rows.
        held_out: Rows, or several sets of them by name, or nothing.
        tokenizer: The model's.
        max_length: Tokens of a text that are read.
    """
    from transformers import DataCollatorWithPadding, Trainer

    def ready(rows: Any) -> Any:
        if isinstance(rows, dict):
            return {name: ready(part) for name, part in rows.items()}
        return rows and tokenized(rows, data.labels, tokenizer, max_length)[0]

    args.label_names = ["labels"]
    learned, counts = tokenized(data.train, data.labels, tokenizer, max_length)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=learned,
        eval_dataset=ready(held_out),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda prediction: scores(prediction.predictions, prediction.label_ids),
    )
    trainer.row_counts = counts  # pyright: ignore[reportAttributeAccessIssue]
    return trainer


def tokenized(rows: "Dataset", labels: list[str], tokenizer: Any, max_length: int) -> "tuple[Dataset, Counts]":
    """The rows as the Trainer takes them, and how many are cut. However many are, they are not refused: a classifier
    reads the same beginning of a text whenever it is used, and no answer loses its end."""
    number = {label: index for index, label in enumerate(labels)}

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        tokens = encoded(batch, tokenizer, truncation=True, max_length=max_length)
        return {**tokens, "labels": [number[label] for label in batch["label"]]}

    made = rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc="Tokenizing")
    full = [place for place, ids in enumerate(made["input_ids"]) if len(ids) == max_length]
    if cut := sum(length > max_length for length in untruncated(rows.select(full), tokenizer)) if full else 0:
        level = logging.WARNING if 2 * cut > len(rows) else logging.INFO
        log.log(level, "data: of %d rows %d are cut at training.max_length %d", len(rows), cut, max_length)
    return made, Counts(rows=len(rows), cut=cut)


def encoded(rows: Mapping[str, Any], tokenizer: Any, **limits: Any) -> Any:
    """What a classifier reads of texts, or of pairs of texts: with the tokenizer's separator, or else a blank line,
    between the two."""
    texts, pairs = rows["text"], rows.get("text_pair")
    if pairs is None:
        return tokenizer(texts, **limits)
    if tokenizer.sep_token is None or not all(pairs):  # of several sources, some rows may have one text
        return tokenizer(["\n\n".join(filter(None, pair)) for pair in zip(texts, pairs, strict=True)], **limits)
    return tokenizer(texts, pairs, **limits)


def untruncated(rows: "Dataset", tokenizer: Any) -> list[int]:
    """How many tokens each row has before it is cut."""
    return [len(ids) for ids in encoded(rows[:], tokenizer, truncation=False)["input_ids"]]


def scores(logits: Any, labels: Any) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur in the labels or the predictions."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    labels, predicted = np.asarray(labels), np.argmax(logits, axis=-1)
    f1 = macro_f1(confusion(labels, predicted, logits.shape[-1]))
    return {"accuracy": float(np.mean(predicted == labels)), "macro_f1": f1}


def confusion(right: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often each class was taken for each: integers of shape (right class, predicted class)."""
    return np.bincount(right * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def macro_f1(counts: np.ndarray) -> float:
    """F1 of a confusion matrix, averaged over the classes that occur, in the rows or in the predictions."""
    sums = counts.sum(0) + counts.sum(1)
    return float(np.mean(2 * np.diagonal(counts)[sums > 0] / sums[sums > 0]))
