"""The training itself: held-out loss before, every step or those after the last checkpoint, held-out loss after."""

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from flashbone.errors import ConfigError
from flashbone.train.callbacks import MetricsLog, Progress, Recorder
from flashbone.train.folder import RunFolder

log = logging.getLogger(__name__)


def fit(trainer: Any, folder: RunFolder, begin: Callable[[], None]) -> tuple[MetricsLog, Recorder]:
    """Train to the last step, from the folder's last checkpoint if there is one; every loss goes to its log.

    Args:
        trainer: With the model, the rows and the arguments; its callbacks for printing are replaced.
        folder: Of the run.
        begin: Called in the main process when everything is ready and nothing has been written.

    Raises:
        ConfigError: the processes that were launched would not train together.
        NonFiniteError: a loss is NaN or infinite.
    """
    _check_engine(trainer)
    trainer.accelerator.wait_for_everyone()
    checkpoint = folder.last_checkpoint()
    metrics = MetricsLog(folder.metrics, _step_of(checkpoint) if checkpoint else None)
    if trainer.args.process_index == 0:
        begin()
        metrics.rewrite()
    recorder = _install_callbacks(trainer, metrics)
    has_held_out = trainer.eval_dataset is not None
    if has_held_out and metrics.evaluation(0) is None and checkpoint is None:
        if _prepares_once(trainer):
            trainer.args.eval_on_start = True
        else:
            trainer.evaluate()
    _fit(trainer, checkpoint)
    if has_held_out and _missing_on_main(trainer, metrics, trainer.state.global_step):
        trainer.evaluate()
    return metrics, recorder


def _check_engine(trainer: Any) -> None:
    """accelerate takes processes without an accelerator for single ones, and FSDP without one for DDP, in silence."""
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
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress())
    recorder = Recorder(metrics)
    trainer.add_callback(recorder)
    return recorder


def _fit(trainer: Any, checkpoint: Path | None) -> None:
    """Train to the last step, from the checkpoint if there is one."""
    total = _total_steps(trainer)
    for name in ("eval_steps", "save_steps", "logging_steps"):  # shares of the run, made whole as the Trainer does
        every = getattr(trainer.args, name)
        if every and every < 1:
            setattr(trainer.args, name, math.ceil(total * every))
    if checkpoint is None:
        trainer.train()
        return
    log.info("resume: going on from %s", checkpoint)
    if _step_of(checkpoint) < total:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:  # killed after the last step; the Trainer would take one more
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _total_steps(trainer: Any) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    steps_per_epoch = max(1, math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * steps_per_epoch)


def _prepares_once(trainer: Any) -> bool:
    """Whether a model that was evaluated first would be trained as it is then: accelerate leaves a model alone that it
    has prepared before, for DDP without any word, so that each process would train alone; FSDP and DeepSpeed need the
    optimiser for it."""
    return trainer.accelerator.use_distributed or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def _missing_on_main(trainer: Any, metrics: MetricsLog, step: int) -> bool:
    """Whether the main process, which alone keeps the log, has no held-out loss at `step`; all agree on the answer."""
    from accelerate.utils import broadcast_object_list

    answer = [metrics.evaluation(step) is None]
    return bool(broadcast_object_list(answer)[0]) if trainer.accelerator.num_processes > 1 else answer[0]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
