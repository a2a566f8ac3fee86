"""summary.json: the figures of a finished run."""

import resource
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import peft
import torch
import transformers

from flashbone import __version__
from flashbone.train.checkpoints import best_step
from flashbone.train.data.loading import Data
from flashbone.train.data.sources import Source
from flashbone.train.metrics import MetricsLog
from flashbone.train.monitor import ANGLE, ERROR, GRADIENT
from flashbone.train.recipe import Recipe
from flashbone.train.samples import Sample
from flashbone.train.tasks import MEASURED


@dataclass(frozen=True)
class Summary:
    """The content of summary.json; units are in the names, and null is what was not measured.

    Attributes:
        train_rows: of a stream those that were learned; null where processes of their own read it.
        cut_rows: of them, as the model sees them, those longer than training.max_length.
        lost_ends: answers whose end was cut off.
        dropped_rows: of which nothing was left to learn.
        sources: what each place of rows brought.
        samples: answers to held-out prompts, or held-out rows of a wrong class.
        rotation: the last figures of the variant orthogonal, the largest of all modules.
        eval_reward_accuracy_after: the share of held-out pairs of answers of which the better one gets more reward.
        eval_reward_margin_after: how much more, on average.
        best_step: the step whose weights the adapter has, where the best are kept and not the last; the figures "after"
            are those of this step.
        train_s: seconds in optimiser steps, of all processes that resumed the run.
        peak_mib: of this process: allocated on the GPU, or resident on the CPU (loading included).
    """

    model: str
    task: str
    variant: str
    block_size: int | None
    train_rows: int | None
    eval_rows: int
    labels: list[str]
    steps: int
    epochs: float
    trainable_parameters: int
    total_parameters: int
    trainable_percent: float
    train_loss: float | None
    rotation: dict[str, float | None] | None
    tokens: int
    train_s: float
    tokens_per_s: float | None
    peak_mib: float
    peak_of: str
    device: str
    processes: int
    versions: dict[str, str]
    cut_rows: int | None = None
    lost_ends: int | None = None
    dropped_rows: int | None = None
    best_step: int | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    eval_accuracy_before: float | None = None
    eval_accuracy_after: float | None = None
    eval_macro_f1_before: float | None = None
    eval_macro_f1_after: float | None = None
    eval_reward_accuracy_before: float | None = None
    eval_reward_accuracy_after: float | None = None
    eval_reward_margin_before: float | None = None
    eval_reward_margin_after: float | None = None
    eval_reward_before: float | None = None
    eval_reward_after: float | None = None
    sources: list[Source] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def summarise(recipe: Recipe, trainer: Any, data: Data, metrics: MetricsLog, train_s: float) -> Summary:
    """The figures of a run that has been trained to its end."""
    trainable, total = trainer.accelerator.unwrap_model(trainer.model).get_nb_trainable_parameters()
    step, best = trainer.state.global_step, best_step(trainer)
    held_out: dict[str, Any] = {
        f"{name}_{when}": (metrics.evaluation(at) or {}).get(key)
        for key, name, _ in MEASURED
        for when, at in (("before", 0), ("after", best or step))
    }
    config = next(iter(trainer.model.peft_config.values())) if hasattr(trainer.model, "peft_config") else None
    tokens = metrics.last("tokens", 0)
    rotation = {key.partition("/")[2]: metrics.last(key) for key in (ERROR, ANGLE, GRADIENT)}
    return Summary(
        model=recipe.model,
        task=recipe.task,
        variant=getattr(config, "variant", recipe.adapter.get("variant", "bone")),
        block_size=getattr(config, "r", recipe.adapter.get("r")),
        **(_of_stream(trainer, data) if data.is_stream else _of_rows(trainer, data)),
        eval_rows=len(data.eval) if data.eval is not None else 0,
        labels=data.labels,
        steps=step,
        best_step=best,
        epochs=round(trainer.state.epoch or 0.0, 4),
        trainable_parameters=trainable,
        total_parameters=total,
        trainable_percent=round(100 * trainable / total, 4),
        train_loss=metrics.last("loss"),
        rotation=None if rotation["error"] is None else rotation,
        tokens=tokens,
        train_s=round(train_s, 3),
        tokens_per_s=round(tokens / train_s, 1) if train_s else None,
        **peak_memory(),
        device=str(trainer.args.device),
        processes=trainer.accelerator.num_processes,
        versions=versions(),
        **held_out,
    )


def _of_rows(trainer: Any, data: Data) -> dict[str, Any]:
    """What became of the training rows, as fields of the summary."""
    counts = trainer.row_counts
    fields = {"cut_rows": counts.cut, "lost_ends": counts.lost_ends, "dropped_rows": counts.empty}
    return {"train_rows": len(data.train), **fields, "sources": data.sources}


def _of_stream(trainer: Any, data: Data) -> dict[str, Any]:
    """The same of a stream, up to the last step; packed rows also count where they were read ahead."""
    args, counted = trainer.args, data.counted
    if not counted.rows:  # the loader's own processes read it
        return {"train_rows": None, "sources": data.sources}
    of_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    counts = counted.of(None if args.packing else trainer.state.global_step * of_a_step)
    numbers = range(len(data.sources))
    sources = [
        replace(source, rows=counts["read", number], learned=counts["learned", number])
        for number, source in enumerate(data.sources)
    ]
    names = {"train_rows": "learned", "cut_rows": "cut", "lost_ends": "lost_ends", "dropped_rows": "empty"}
    totals = {field: sum(counts[name, number] for number in numbers) for field, name in names.items()}
    return {**totals, "sources": sources}


def versions() -> dict[str, str]:
    """Of the packages whose version may change a result."""
    return {
        "flashbone": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def peak_memory() -> dict[str, Any]:
    """`peak_mib` and `peak_of`, as in the summary."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return {"peak_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1), "peak_of": "GPU memory allocated"}
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_mib": round(peak / 2**20, 1), "peak_of": "resident memory"}
