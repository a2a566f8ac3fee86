"""The test at the end of a run: scores of single rows that were neither learned nor held out."""

import dataclasses
import json
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from flashbone.compare.config import Answers
from flashbone.compare.runs import RunSpec
from flashbone.errors import ConfigError
from flashbone.evaluate.exact_match import check_room, exact_matches
from flashbone.evaluate.scoring import row_classes, row_losses
from flashbone.train.classify import scores
from flashbone.train.data.conversations import answers
from flashbone.train.data.loading import Data


def test(spec: RunSpec, trainer: Any, data: Data) -> dict[str, Any]:
    """Score the test rows; returns fields of `RunRow`: figures, and scores and weights of single rows."""
    model, amp = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.autocast
    # Not the trainer's loader: it may sort rows by their length, and all runs have to score them in one order.
    args = trainer.args  # without padding a batch is one long row, and rows could not be told apart
    size = 1 if getattr(args, "packing", False) or getattr(args, "padding_free", False) else args.eval_batch_size
    batches = DataLoader(trainer.test_dataset, batch_size=size, collate_fn=trainer.data_collator)
    if spec.metric == "accuracy":
        predicted, wanted, losses = zip(*row_classes(model, batches, amp), strict=True)
        figures = scores(np.eye(len(data.labels))[list(predicted)], np.array(wanted))
        right = [int(p == w) for p, w in zip(predicted, wanted, strict=True)]
        return _fields({"loss": float(np.mean(losses)), **figures}, right, [1] * len(right))
    sums, tokens = map(list, zip(*row_losses(model, batches, amp), strict=True))
    figures = {"loss": sum(sums) / max(1, sum(tokens))}
    if spec.metric == "loss":
        return _fields(figures, [round(value, 5) for value in sums], tokens)
    answers = dataclasses.asdict(Answers(**spec.answers))
    answered = exact_matches(model, trainer.processing_class, _questions(data), **answers, amp=amp)
    right = [int(row.right) for row in answered]
    return _fields({**figures, "exact_match": sum(right) / len(right)}, right, [1] * len(right))


def _fields(figures: dict[str, float], row_scores: list[Any], weights: list[int]) -> dict[str, Any]:
    return {"test": figures, "test_scores": tuple(row_scores), "test_weights": tuple(weights)}


def check_rows(spec: RunSpec, data: Data) -> None:
    """Refuse test rows that could not be tested, before anything is trained.

    Raises:
        ConfigError: there are none, or they have no answers that could be compared.
    """
    if not data.test:
        raise ConfigError(f"data.test: {spec.data['test']} makes no test rows; give a share, a number or a file")
    if spec.metric == "exact_match" and not {"prompt", "conversation"} & set(data.test.column_names):
        raise ConfigError("metric exact_match: data.test has no prompts and answers; its rows are texts")


def check_prompts(spec: RunSpec, trainer: Any, data: Data) -> None:
    """Refuse questions that leave the model no room for an answer, before anything is trained.

    Raises:
        ConfigError: there is one.
    """
    if spec.metric == "exact_match":
        answers = Answers(**spec.answers)
        check_room(trainer.model, trainer.processing_class, _questions(data), answers.max_new_tokens)


def _questions(data: Data) -> list[tuple[Any, str]]:
    """Prompts and the answers that are wanted."""
    assert data.test is not None
    rows: Any = data.test
    if "conversation" not in data.test.column_names:
        return [(row["prompt"], row["completion"]) for row in rows]
    asked = [answer for row in rows for answer in answers(row["conversation"])]
    return [(answer["prompt"], answer["completion"][-1]["content"]) for answer in asked]


def overlap(data: Data) -> dict[str, int]:
    """How many test rows are learned or held out as well, word for word."""

    def texts(part: Any) -> set[str]:
        columns = [name for name in part.column_names if name != "label"] if part else []
        return {json.dumps({name: row[name] for name in columns}, sort_keys=True) for row in part or ()}

    tested = texts(data.test)
    return {"learned": len(tested & texts(data.train)), "held_out": len(tested & texts(data.eval))}
