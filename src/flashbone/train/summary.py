"""The figures of a finished run: sizes, losses before and after, time, speed, memory, versions."""

import resource
import sys
from typing import Any

import peft
import torch
import transformers

from flashbone import __version__
from flashbone.train.data.loading import Data
from flashbone.train.fitting import MetricsLog, Recorder
from flashbone.train.monitor import ANGLE, ERROR, GRADIENT
from flashbone.train.recipe import Recipe


def summarise(recipe: Recipe, trainer: Any, data: Data, metrics: MetricsLog, recorder: Recorder) -> dict[str, Any]:
    """What the run did, for summary.json and the table; units are in the names."""
    trainable, total = trainer.accelerator.unwrap_model(trainer.model).get_nb_trainable_parameters()
    step = trainer.state.global_step
    before, after = metrics.evaluation(0) or {}, metrics.evaluation(step) or {}
    held_out = {}
    for key in ("eval_loss", "eval_accuracy", "eval_macro_f1"):
        if key in after:
            held_out |= {f"{key}_before": before.get(key), f"{key}_after": after[key]}
    config = next(iter(trainer.model.peft_config.values())) if hasattr(trainer.model, "peft_config") else None
    tokens = metrics.last("tokens", 0)
    return {
        "model": recipe.model,
        "task": recipe.task,
        "variant": getattr(config, "variant", recipe.adapter.get("variant", "bone")),
        "block_size": getattr(config, "r", recipe.adapter.get("r")),
        "train_rows": len(data.train),
        "eval_rows": len(data.eval) if data.eval is not None else 0,
        "labels": data.labels,
        "steps": step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_percent": round(100 * trainable / total, 4),
        "train_loss": metrics.last("loss"),
        "rotation": _rotation(metrics),
        **held_out,
        "tokens": tokens,
        "train_s": round(recorder.train_s, 3),
        "tokens_per_s": round(tokens / recorder.train_s, 1) if recorder.train_s else None,
        **peak_memory(),
        "device": str(trainer.args.device),
        "processes": trainer.accelerator.num_processes,
        "versions": {
            "flashbone": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }


def _rotation(metrics: MetricsLog) -> dict[str, float] | None:
    """The last logged figures of the orthogonal variant, the largest of all modules; None for other variants."""
    figures = {key.partition("/")[2]: metrics.last(key) for key in (ERROR, ANGLE, GRADIENT)}
    return None if figures["error"] is None else figures


def peak_memory() -> dict[str, Any]:
    """Peak of this process: allocated on the GPU, or resident on the CPU (loading included)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return {"peak_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1), "peak_of": "GPU memory allocated"}
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_mib": round(peak / 2**20, 1), "peak_of": "resident memory"}
