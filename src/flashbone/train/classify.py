"""Text classification: tokenized rows, a Trainer on a PEFT model with a new head, accuracy and macro-F1."""

from typing import TYPE_CHECKING, Any

import numpy as np

from flashbone.train.data import Data

if TYPE_CHECKING:
    from datasets import Dataset

MAX_LENGTH = 512  # tokens of a text that are read, unless training.max_length says otherwise


def classification_trainer(model: Any, config: Any, args: Any, data: Data, tokenizer: Any, max_length: int) -> Any:
    """A Trainer on `model` adapted with `config`; PEFT trains and saves the head along."""
    from peft import get_peft_model
    from transformers import DataCollatorWithPadding, Trainer

    args.label_names = ["labels"]
    return Trainer(
        model=get_peft_model(model, config),
        args=args,
        train_dataset=_tokenized(data.train, data.labels, tokenizer, max_length),  # pyright: ignore[reportArgumentType]
        eval_dataset=data.eval and _tokenized(data.eval, data.labels, tokenizer, max_length),  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda prediction: scores(prediction.predictions, prediction.label_ids),
    )


def _tokenized(rows: "Dataset", labels: list[str], tokenizer: Any, max_length: int) -> "Dataset":
    number = {label: index for index, label in enumerate(labels)}

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        tokens = tokenizer(batch["text"], truncation=True, max_length=max_length)
        return {**tokens, "labels": [number[label] for label in batch["label"]]}

    return rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def scores(logits: Any, labels: Any) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur in the labels or the predictions."""
    predicted = np.argmax(logits[0] if isinstance(logits, tuple) else logits, axis=-1)
    labels = np.asarray(labels)
    f1 = []
    for label in np.union1d(labels, predicted):
        hits = np.sum((predicted == label) & (labels == label))
        f1.append(2 * hits / (np.sum(predicted == label) + np.sum(labels == label)))
    return {"accuracy": float(np.mean(predicted == labels)), "macro_f1": float(np.mean(f1))}
