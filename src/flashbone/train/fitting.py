"""The training itself: held-out loss before, every step or those after the last checkpoint, held-out loss after."""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from flashbone.errors import ConfigError, NonFiniteError
from flashbone.train.checkpoints import STATE, Checkpoints, best_step, problem, step_of
from flashbone.train.folder import RunFolder
from flashbone.train.metrics import LoggedStep, MetricsLog

log = logging.getLogger(__name__)

T = TypeVar("T")

# Wall-clock figures and counters that a resumed run would repeat differently; ours are tokens and train_s.
DROPPED = ("runtime", "_per_second", "num_tokens", "total_flos", "preparation_time", "step_time")


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
        line = LoggedStep(state.global_step, logs.get("num_input_tokens_seen", 0), round(self.train_s, 3))
        skipped = (*DROPPED, "num_input_tokens_seen")
        row = asdict(line) | {key: value for key, value in logs.items() if not key.endswith(skipped)}
        self.metrics.append({key: _json_number(value) for key, value in row.items()})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any):
        name = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if metrics and name not in metrics:
            measured = [
                key.removeprefix("eval_") for key in metrics if key.startswith("eval_") and not key.endswith(DROPPED)
            ]
            if not measured:
                raise ConfigError(
                    "training.dataloader_drop_last: leaves no batch of held-out rows; hold out more, or leave it out"
                )
            raise ConfigError(
                f"training.metric_for_best_model: got {args.metric_for_best_model!r}, wanted {' or '.join(measured)}"
            )


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


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which also goes on counting in a resumed run."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        states: Any = state.stateful_callbacks
        saved = states.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]


def fit(trainer: Any, folder: RunFolder, begin: Callable[[], None] | None = None) -> tuple[MetricsLog, Recorder]:
    """Train to the last step, from the folder's last checkpoint if there is one; every loss goes to its log.

    Args:
        trainer: With the model, the rows and the arguments; its callbacks for printing are replaced.
        folder: Of the run.
        begin: Called in the main process when everything is ready and nothing has been written or removed.

    Raises:
        ConfigError: the processes that were launched would not train together.
        NonFiniteError: a loss is NaN or infinite.
    """
    _check_engine(trainer)
    trainer.accelerator.wait_for_everyone()
    checkpoint = _of_main(trainer, folder.last_checkpoint)
    if checkpoint is not None:
        _check_best(trainer, checkpoint)
    metrics = MetricsLog(folder.metrics, step_of(checkpoint) if checkpoint else None)
    if trainer.args.process_index == 0:
        if begin is not None:
            begin()
        folder.remove_partial()
        metrics.rewrite()
    trainer.add_callback(Checkpoints(trainer))
    recorder = _install_callbacks(trainer, metrics)
    _keep_inside(trainer, folder)
    has_held_out = trainer.eval_dataset is not None
    with folder.forgotten_unless(lambda: trainer.state.global_step or trainer.args.process_index):
        if has_held_out and metrics.evaluation(0) is None and checkpoint is None:
            if _prepares_once(trainer):
                trainer.args.eval_on_start = True
            else:
                trainer.evaluate()
        _fit(trainer, checkpoint)
    step = best_step(trainer) or trainer.state.global_step
    if has_held_out and _of_main(trainer, lambda: metrics.evaluation(step) is None):
        trainer.evaluate()
    return metrics, recorder


def _check_engine(trainer: Any) -> None:
    """accelerate takes processes without an accelerator for single ones, and FSDP without one for DDP, silently."""
    launched, running = int(os.environ.get("WORLD_SIZE", "1")), trainer.accelerator.num_processes
    if launched != running:
        raise ConfigError(
            f"{launched} processes were launched, but each would train alone, since there is no accelerator; set"
            " training.use_cpu: true, or training.ddp_backend: gloo for DeepSpeed"
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        raise ConfigError("accelerate runs FSDP on accelerators only; on CPUs launch with a config for DDP")


def _install_callbacks(trainer: Any, metrics: MetricsLog) -> Recorder:
    """Ours in place of transformers' progress and printer callbacks, which write to stdout."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress())
    recorder = Recorder(metrics)
    trainer.add_callback(recorder)
    return recorder


def _keep_inside(trainer: Any, folder: RunFolder) -> None:
    """TensorBoard's files in the run's folder: at a loss before training, its callback would begin them in ./runs."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder.path / "tensorboard")


def _fit(trainer: Any, checkpoint: Path | None) -> None:
    """Train to the last step, from the checkpoint if there is one."""
    total = total_steps(trainer)
    for name in ("eval_steps", "save_steps", "logging_steps"):  # shares of the run, made whole as the Trainer does
        every = getattr(trainer.args, name)
        if every and every < 1:
            setattr(trainer.args, name, math.ceil(total * every))
    if checkpoint is None:
        trainer.train()
        return
    log.info("resume: going on from %s", checkpoint)
    state = _state_of(checkpoint)
    if step_of(checkpoint) < total and not _has_stopped(trainer, state):
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    trainer._load_from_checkpoint(str(checkpoint))  # killed after the last step; the Trainer would take one more
    trainer.state = state
    if best_step(trainer):
        state.best_model_checkpoint = str(checkpoint.with_name(Path(str(state.best_model_checkpoint)).name))
        trainer._load_best_model()


def _has_stopped(trainer: Any, state: TrainerState) -> bool:
    """Whether early stopping had ended the run at this state."""
    stopping = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, EarlyStopping)]
    states: Any = state.stateful_callbacks or {}
    saved = states.get(EarlyStopping.__name__)
    if not (stopping and saved):
        return False
    return saved["attributes"]["early_stopping_patience_counter"] >= stopping[0].early_stopping_patience


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / STATE))


def _check_best(trainer: Any, checkpoint: Path) -> None:
    """Refuse to go on towards a best checkpoint that is not whole: its weights could not be loaded at the end."""
    best = _state_of(checkpoint).best_model_checkpoint
    if not trainer.args.load_best_model_at_end or best is None:
        return
    place = checkpoint.with_name(Path(best).name)
    if wrong := problem(place):
        raise ConfigError(
            f"{place}: the best checkpoint so far is not whole ({wrong}); resume with training.load_best_model_at_end:"
            " false, or begin again in another output"
        )


def total_steps(trainer: Any) -> int:
    """The optimiser steps of the run, as the Trainer counts them."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    steps_per_epoch = max(1, math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * steps_per_epoch)


def _prepares_once(trainer: Any) -> bool:
    """Whether a model that was evaluated first would be trained as it is then: accelerate leaves a model alone that it
    has prepared before, for DDP silently, so that each process would train alone; FSDP and DeepSpeed need the
    optimiser for it."""
    return trainer.accelerator.use_distributed or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def _of_main(trainer: Any, ask: Callable[[], T]) -> T:
    """The answer of the main process, which alone asks, in all processes."""
    from accelerate.utils import broadcast_object_list

    answer = [ask() if trainer.args.process_index == 0 else None]
    return (broadcast_object_list(answer) if trainer.accelerator.num_processes > 1 else answer)[0]  # pyright: ignore
