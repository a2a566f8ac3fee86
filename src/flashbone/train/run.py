"""One training run from recipe to results on disk: prepare, train or resume, evaluate, save, sum up."""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashbone.errors import ConfigError, FlashboneError
from flashbone.files.outputs import whole_or_absent, write_text
from flashbone.files.records import finite, to_json
from flashbone.train import folder as run_folder
from flashbone.train.arguments import check_launch, check_optimizer, trainer_arguments
from flashbone.train.card import add_run
from flashbone.train.checkpoints import write_stops
from flashbone.train.data.loading import load_data
from flashbone.train.data.origins import sources_of
from flashbone.train.data.windows import windows_for
from flashbone.train.fitting import EarlyStopping, fit
from flashbone.train.folder import RunFolder
from flashbone.train.inert import StopIfInert
from flashbone.train.inputs import Inputs, inputs_of
from flashbone.train.lengths import limit_length
from flashbone.train.merged import find_merge_base, write_merged
from flashbone.train.monitor import RotationMonitor, trained_rotations
from flashbone.train.recipe import Recipe, check_task, early_stopping_of
from flashbone.train.rewards import Reward
from flashbone.train.samples import Samples
from flashbone.train.summary import Summary, summarise
from flashbone.train.tasks import TASKS
from flashbone.train.trainers import build_trainer

log = logging.getLogger(__name__)

SMALL_FILE_BYTES = 2**20


@dataclass
class Result:
    """A run's folder and the content of its summary.json; `is_main` is false in helper processes."""

    folder: RunFolder
    summary: dict[str, Any]
    is_main: bool = True


def train(
    recipe: Recipe,
    resume: bool = False,
    on_start: Callable[[], None] | None = None,
    reward: Reward | None = None,
) -> Result:
    """Run the recipe; `resume` goes on from the last checkpoint in its output, to the same losses.

    Args:
        recipe: The recipe.
        resume: Whether a run is continued.
        on_start: Called in the main process before the first step, when everything else is ready.
        reward: For task grpo: a function that rewards answers, besides those of the recipe.

    Raises:
        FlashboneError: recipe, data, model or disk do not allow it; an earlier run in the output is left as it was.
    """
    folder = RunFolder(recipe.output)
    summary = run_folder.finished(recipe) if resume else None
    if summary is not None:
        log.info("resume: the run in %s is finished; nothing to do", folder.path)
        return Result(folder, dataclasses.asdict(summary), _is_main())
    check_task(recipe)
    args = trainer_arguments(recipe)
    check_launch(recipe, args)
    claimed = run_folder.claimed(recipe, resume) if args.process_index == 0 else contextlib.nullcontext()
    with claimed, run_folder.disk_errors(folder), _known_failures(), _hub_errors(args), _bars_if_long(recipe):
        return _train(recipe, folder, args, on_start, reward)


def _train(
    recipe: Recipe, folder: RunFolder, args: Any, on_start: Callable[[], None] | None, reward: Reward | None
) -> Result:
    limit_length(recipe, args)
    with args.main_process_first():
        data = load_data(recipe, windows_for(args))
    trainer, load_plain = build_trainer(recipe, args, data, reward=reward)
    StopIfInert.attach(trainer)
    check_optimizer(trainer)
    merge_base = find_merge_base(recipe, folder, trainer) if recipe.merge and args.process_index == 0 else None
    if recipe.monitor and trained_rotations(trainer.model):
        RotationMonitor.attach(trainer)
    if (stopping := early_stopping_of(recipe)) is not None:
        trainer.add_callback(EarlyStopping(stopping.patience, stopping.min_delta))
    begin = None
    if args.process_index == 0:
        inputs = inputs_of(recipe, trainer, data)
        run_folder.check_inputs(folder, inputs)
        begin = functools.partial(_begin, recipe, inputs, on_start)
    samples = Samples(trainer, data, recipe.samples if TASKS[recipe.task].answers or data.labels else 0)
    samples.ask_before()
    data.counted.clear()
    metrics, recorder = fit(trainer, folder, begin)
    summary = summarise(recipe, trainer, data, metrics, recorder.train_s)
    _save(folder, trainer, recipe, summary)
    summary = dataclasses.replace(summary, samples=samples.after())
    if recipe.merge and args.process_index == 0:
        write_merged(folder, merge_base, trainer, load_plain if recipe.quantization else None)
    if args.process_index == 0:
        write_text(folder.summary, to_json(summary))
    trainer.accelerator.wait_for_everyone()
    return Result(folder, finite(dataclasses.asdict(summary)), args.process_index == 0)


def _begin(recipe: Recipe, inputs: Inputs, on_start: Callable[[], None] | None) -> None:
    if on_start is not None:
        on_start()
    run_folder.record(recipe, inputs)


def _save(folder: RunFolder, trainer: Any, recipe: Recipe, summary: Summary) -> None:
    """Adapter, card and tokenizer, in a folder that appears whole."""
    main = trainer.accelerator.is_main_process
    if trainer.is_fsdp_enabled:  # of a sharded kind the Trainer would silently write no adapter
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.accelerator.wait_for_everyone()
    with whole_or_absent(folder.adapter, replace=True) if main else contextlib.nullcontext(folder.adapter) as partial:
        trainer.save_model(str(partial))  # sharded models need every process here
        if main:
            trainer.processing_class.save_pretrained(partial)
            write_stops(trainer, partial)
            add_run(partial / "README.md", recipe, summary)
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _bars_if_long(recipe: Recipe):
    """No bars of `datasets` where each would be gone in a blink."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    files = [Path(place.path) for place in sources_of(recipe.data)]
    is_small = all(file.is_file() and file.stat().st_size < SMALL_FILE_BYTES for file in files)
    quiet = is_small and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            enable_progress_bars()


@contextlib.contextmanager
def _hub_errors(args: Any):
    """One line where `push_to_hub` reaches no hub, or is not let in."""
    try:
        yield
    except Exception as error:
        of_the_hub = isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "requests"))
        if not args.push_to_hub or not of_the_hub or getattr(error, "errno", None):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"training.push_to_hub: {reason}; log in and connect, or leave it out") from error


@contextlib.contextmanager
def _known_failures():
    """One line where the GPU is full, or a package is missing that `training` asks for."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"training: {' '.join(str(error).split())[:300]}") from error
    except torch.cuda.OutOfMemoryError as error:
        raise FlashboneError(
            "the GPU is out of memory; lower training.per_device_train_batch_size (and raise "
            f"training.gradient_accumulation_steps), or set training.gradient_checkpointing: true ({str(error)[:120]})"
        ) from error
