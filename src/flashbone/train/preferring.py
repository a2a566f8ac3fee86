"""Learning from preferences by TRL's trainers, on rows that are tokenised as all others are."""

import functools
import json
from dataclasses import replace
from typing import Any

from flashbone.errors import ConfigError
from flashbone.train.data.loading import Data
from flashbone.train.data.prepared import Counts
from flashbone.train.data.tokens import IGNORED
from flashbone.train.tasks import TASKS

START = "ref"  # TRL's name for a copy of the adapter that a run goes on with, before its first step


def as_trl_takes_them(task: str, data: Data, args: Any) -> Data:
    """The tokenised rows with the columns of the task's trainer.

    Raises:
        ConfigError: all rows of kto have the same label.
    """
    if task == "kto" and len(set(data.train["label"])) < 2:
        raise ConfigError(
            "data: all labels are the same; kto learns from answers that are wanted and others that are not"
        )
    parts = {"train": data.train, "eval": data.eval, "test": data.test}
    return replace(data, **{name: rows and _columns(task, name, rows, args) for name, rows in parts.items()})


def prompts(data: Data, learned: Counts, args: Any) -> Data:
    """The prompts as the trainer of grpo takes them, of rows that have been tokenised to be checked.

    Raises:
        ConfigError: a prompt leaves no room for an answer.
    """
    if learned.cut:
        raise ConfigError(
            f"data: {learned.cut} of {learned.rows} prompts and training.max_completion_length"
            f" {args.max_completion_length} are more than the model's positions; lower it, or take them out"
        )
    parts = {"train": data.train, "eval": data.eval, "test": data.test}
    made = {name: rows and rows.map(_asked, remove_columns=rows.column_names) for name, rows in parts.items()}
    return replace(data, **made)


def _asked(example: dict[str, Any]) -> dict[str, Any]:
    prompt = example.get("prompt")
    if prompt is None:
        prompt = json.loads(example["conversation"])["messages"][:-1]
    return {"prompt": prompt, "answer": example["answer"]}


def _columns(task: str, part: str, rows: Any, args: Any) -> Any:
    if task == "kto" and part == "train":  # TRL keeps their order, and pairs each answer with the next prompt
        rows = rows.shuffle(seed=args.seed)
    convert = {"dpo": _pair, "reward": _whole_pair, "kto": _answer}[task]
    rows = rows.map(convert, remove_columns=rows.column_names, num_proc=args.dataset_num_proc, desc="Preparing")
    if task == "kto":
        rows = rows.map(_mismatched, batched=True, batch_size=args.per_device_train_batch_size, desc="Pairing")
    return rows


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    start = min(_start(row["labels"]), _start(row["rejected_labels"]))
    answers = {"chosen_ids": row["input_ids"][start:], "rejected_ids": row["rejected_ids"][start:]}
    return {"prompt_ids": row["input_ids"][:start], **answers}


def _whole_pair(row: dict[str, Any]) -> dict[str, Any]:
    return {"chosen_ids": row["input_ids"], "rejected_ids": row["rejected_ids"]}


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    ids, start = row["input_ids"], _start(row["labels"])
    return {"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": row["label"]}


def _mismatched(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Each prompt with the answer to the one before: of those TRL estimates how far the model is from its reference."""
    answers = batch["completion_ids"]
    return {"KL_completion_ids": [answers[-1], *answers[:-1]]}


def _start(labels: list[int]) -> int:
    return next(place for place, label in enumerate(labels) if label != IGNORED)


class _Measuring:
    """What our subclasses of TRL's trainers do otherwise: rows are ready, and figures of held-out rows are means over
    rows. TRL's are means over batches, of which the last is smaller."""

    _metrics: dict[str, Any]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        metrics = self._metrics["eval"]
        before = {name: len(values) for name, values in metrics.items()}
        wanted = inputs["label"].sum().item() if "label" in inputs else len(inputs["input_ids"]) // 2
        unwanted = len(inputs["input_ids"]) - wanted
        result = super().compute_loss(model, inputs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for name, values in metrics.items():
            rows = unwanted if name.endswith("/rejected") else wanted
            if len(values) > before.get(name, 0):
                values += values[-1:] * (rows - 1)
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for metrics in self._metrics.values():
            for theirs, ours in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):  # of reward models
                if theirs in metrics:
                    metrics[ours] = metrics.pop(theirs)
        better, worse = (self._metrics["eval"].get(f"rewards/{kind}") for kind in ("chosen", "rejected"))
        if better and worse:
            self._metrics["eval"]["rewards/margins"] = [sum(better) / len(better) - sum(worse) / len(worse)]
        super().log(logs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def trainer_class(task: str) -> Any:
    """TRL's trainer of the task, for rows that are ready."""
    theirs = TASKS[task].trainer_class()  # pyright: ignore[reportArgumentType]
    if task == "grpo":
        return theirs
    return type(theirs.__name__, (_Measuring, theirs), {})


def keep_start(trainer: Any) -> None:
    """Let the reference be the model with the adapter that the run goes on with: TRL makes an adapter `ref`, but copies
    only what modules hold into it. It is not saved."""
    model = trainer.model
    for name, parameter in list(model.named_parameters()):
        parts = name.split(".")
        if "default" in parts:
            place = len(parts) - 1 - parts[::-1].index("default")
            copy = model.get_parameter(".".join([*parts[:place], START, *parts[place + 1 :]]))
            copy.data = parameter.data.clone()
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=["default"])


def keep_float(trainer: Any) -> None:
    """Undo that TRL makes adapters on quantised models bf16."""
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
