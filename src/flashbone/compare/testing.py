"""Scores of single rows: of held-out rows while a run trains, and of test rows, which decide nothing, at its end."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from flashbone.compare.config import Answers
from flashbone.compare.runs import RunSpec
from flashbone.errors import ConfigError
from flashbone.evaluate.exact_match import check_room, exact_matches
from flashbone.evaluate.scoring import row_classes, row_losses
from flashbone.files.outputs import read_json_lines, write_text
from flashbone.train.classify import scores
from flashbone.train.data.conversations import answers
from flashbone.train.data.loading import Data


class HeldOut:
    """Evaluates the held-out rows one by one, in place of the trainer, which knows only the mean of its batches' means.

    A line of `held_out.jsonl` is the step, the summed loss of each row and its weight. A resumed run adds the steps
    after its checkpoint again: the last line of a step counts.

    Args:
        spec: The run.
        trainer: Whose `evaluate` is replaced.
        file: `held_out.jsonl`.
    """

    def __init__(self, spec: RunSpec, trainer: Any, file: Path):
        self._spec, self._trainer, self._file = spec, trainer, file
        lines = read_json_lines(file, after_kill=True)
        write_text(file, "".join(json.dumps(line) + "\n" for line in lines))  # without one that was cut off
        trainer.evaluate = self

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        trainer = self._trainer
        trainer.model.eval()  # as the trainer's own evaluation leaves it: TRL logs by that
        figures, losses, weights = _scored(self._spec, trainer, trainer.eval_dataset)[:3]
        line = {"step": trainer.state.global_step, "losses": [float(f"{v:.5g}") for v in losses], "weights": weights}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics


def _scored(spec: RunSpec, trainer: Any, rows: Any) -> tuple[dict[str, float], list[float], list[int], list[int]]:
    """Figures of rows as the trainer takes them; each row's loss and weight; and of classifiers what is right."""
    model, amp = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.autocast
    # Not the trainer's loader: it may sort rows by their length, and all runs have to score them in one order.
    args = trainer.args  # without padding a batch is one long row, and rows could not be told apart
    size = 1 if getattr(args, "packing", False) or getattr(args, "padding_free", False) else args.eval_batch_size
    batches = DataLoader(rows, batch_size=size, collate_fn=trainer.data_collator)
    if spec.recipe["task"] == "sft":
        sums, tokens = map(list, zip(*row_losses(model, batches, amp), strict=True))
        return {"loss": sum(sums) / max(1, sum(tokens))}, sums, tokens, []
    predicted, wanted, losses = zip(*row_classes(model, batches, amp), strict=True)
    figures = scores(np.eye(model.config.num_labels)[list(predicted)], np.array(wanted))
    right = [int(p == w) for p, w in zip(predicted, wanted, strict=True)]
    return {"loss": float(np.mean(losses)), **figures}, list(losses), [1] * len(right), right


def test(spec: RunSpec, trainer: Any, data: Data) -> dict[str, Any]:
    """Score the test rows; returns fields of `RunRow`: figures, and scores and weights of single rows."""
    figures, losses, weights, right = _scored(spec, trainer, trainer.test_dataset)
    if asks(spec):
        model, settings = trainer.accelerator.unwrap_model(trainer.model), dataclasses.asdict(Answers(**spec.answers))
        answered = exact_matches(
            model, trainer.processing_class, _questions(data), **settings, amp=trainer.accelerator.autocast
        )
        right = [int(row.right) for row in answered]
        figures["exact_match"] = sum(right) / len(right)
    if spec.metric == "loss":
        return _fields(figures, [round(value, 5) for value in losses], weights)
    return _fields(figures, right, [1] * len(right))


def asks(spec: RunSpec) -> bool:
    """Whether the model answers the test rows: for the metric, or beside the loss."""
    return spec.metric == "exact_match" or bool(spec.answers)


def _fields(figures: dict[str, float], row_scores: list[Any], weights: list[int]) -> dict[str, Any]:
    return {"test": figures, "test_scores": tuple(row_scores), "test_weights": tuple(weights)}


def check_rows(spec: RunSpec, data: Data) -> None:
    """Refuse test rows that could not be tested, before anything is trained.

    Raises:
        ConfigError: there are none, or they have no answers that could be compared.
    """
    if not data.test:
        raise ConfigError(f"data.test: {spec.data['test']} makes no test rows; give a share, a number or a file")
    if asks(spec) and not {"prompt", "conversation"} & set(data.test.column_names):
        raise ConfigError("exact_match: data.test has no prompts and answers; its rows are texts")


def check_prompts(spec: RunSpec, trainer: Any, data: Data) -> None:
    """Refuse questions that leave the model no room for an answer, before anything is trained.

    Raises:
        ConfigError: there is one.
    """
    if asks(spec):
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
