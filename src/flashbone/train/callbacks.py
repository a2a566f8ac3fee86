"""What happens at the trainer's events: metrics to a file, a progress bar on stderr, time per step, logs at saves."""

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from flashbone.errors import NonFiniteError
from flashbone.files.outputs import read_json_lines, write_text

# Wall-clock figures and counters that a resumed run would repeat differently; ours are tokens and train_s.
DROPPED = ("runtime", "_per_second", "num_tokens", "total_flos", "preparation_time")


class MetricsLog:
    """metrics.jsonl: one object for each log event, each step once however often the run was resumed."""

    def __init__(self, path: Path, keep_to_step: int | None = None):
        """Open the log, dropping what was logged after `keep_to_step` (a checkpoint's), or everything."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if keep_to_step is not None:
            self.rows = [row for row in read_json_lines(path, after_kill=True) if row["step"] <= keep_to_step]

    def rewrite(self) -> None:
        """Make the file hold the kept rows and nothing else."""
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The held-out figures at a step."""
        return next((row for row in self.rows if row["step"] == step and "eval_loss" in row), None)

    def last(self, key: str, default: Any = None) -> Any:
        return next((row[key] for row in reversed(self.rows) if key in row), default)


class Recorder(TrainerCallback):
    """Writes the metrics and sums up the time spent in optimiser steps (not in evaluation or saving)."""

    def __init__(self, metrics: MetricsLog):
        self.metrics = metrics
        self.train_s = float(metrics.last("train_s", 0.0))
        self._since: float | None = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._since is not None:
            self.train_s += time.perf_counter() - self._since
        if state.global_step >= state.max_steps:  # the last figures belong in the log whatever logging_steps is
            control.should_log = True
        self._log_at_saves(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._log_at_saves(control)

    @staticmethod
    def _log_at_saves(control: TrainerControl) -> None:
        """The logged loss is a mean since the last log; only a log at each checkpoint makes a resumed mean the same."""
        if control.should_save:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if not logs or "train_loss" in logs:  # the closing summary, which we write ourselves
            return
        _refuse_divergence(logs, state.global_step)
        if not state.is_world_process_zero:
            return
        row: dict[str, Any] = {"step": state.global_step}
        row |= {key: value for key, value in logs.items() if not key.endswith(DROPPED)}
        row["tokens"] = row.pop("num_input_tokens_seen", 0)
        row["train_s"] = round(self.train_s, 3)
        self.metrics.append({key: _json_number(value) for key, value in row.items()})


def _refuse_divergence(logs: dict[str, Any], step: int) -> None:
    for key in ("loss", "eval_loss"):
        if key in logs and not math.isfinite(logs[key]):
            raise NonFiniteError(
                f"step {step}: {key} is {logs[key]}; lower training.learning_rate or raise training.warmup_steps, "
                "and check that the model itself gives finite losses on this data"
            )


def _json_number(value: Any) -> Any:
    """JSON knows no NaN; transformers logs numbers as floats, ints or numpy scalars."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress(ProgressCallback):
    """The trainer's bar on stderr; losses go beside the bar, since transformers prints them on stdout."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {key: f"{value:.4g}" for key, value in (logs or {}).items() if key in ("loss", "eval_loss")}
            if shown:
                self.training_bar.set_postfix(shown, refresh=False)
