"""One training run from recipe to results on disk: prepare, train or resume, evaluate, save, sum up."""

import contextlib
import functools
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from flashbone.errors import ConfigError, FlashboneError
from flashbone.train import folder as outputs
from flashbone.train.arguments import adapter_config, chat_template, model_dtype, trainer_arguments
from flashbone.train.callbacks import MetricsLog, Progress, Recorder
from flashbone.train.classify import MAX_LENGTH, classification_trainer
from flashbone.train.data import Data, load_data
from flashbone.train.folder import RunFolder
from flashbone.train.merged import write_merged
from flashbone.train.models import load_causal_lm, load_classifier, load_tokenizer, quantized_loading
from flashbone.train.monitor import RotationMonitor, trained_rotations
from flashbone.train.recipe import Recipe, rwkv_of
from flashbone.train.start import start_from
from flashbone.train.summary import summarise
from flashbone.train.tokens import accept_tokens, windows_for
from flashbone.train.trainers import refuse_classification, sft_trainer_class

log = logging.getLogger(__name__)

SMALL_FILE_BYTES = 2**20


@dataclass
class Result:
    """Where a run's files are and what `summary.json` holds; `is_main` is false in helper processes."""

    folder: RunFolder
    summary: dict[str, Any]
    is_main: bool = True


def train(recipe: Recipe, resume: bool = False) -> Result:
    """Run the recipe; `resume` goes on from the last checkpoint in its output, to the same losses.

    Raises:
        FlashboneError: recipe, data, model or disk do not allow it; an earlier run in the output is left as it was.
    """
    folder = RunFolder(recipe.output)
    summary = outputs.finished(recipe) if resume else None
    if summary is not None:
        log.info("resume: the run in %s is finished; nothing to do", folder.path)
        return Result(folder, summary, _is_main())
    refuse_classification(recipe)
    args = trainer_arguments(recipe)
    if recipe.merge and (args.fsdp or args.deepspeed):
        raise ConfigError("merge: true needs the whole model in one process; train without it, then `flashbone merge`")
    try:
        if args.process_index == 0:
            outputs.claim(recipe, resume)
        with outputs.disk_errors(folder), _out_of_memory(), _bars_if_long(recipe):
            return _train(recipe, folder, args)
    except BaseException:
        outputs.release(recipe)
        raise


def _train(recipe: Recipe, folder: RunFolder, args: Any) -> Result:
    with args.main_process_first():
        data = load_data(recipe, windows_for(args))
    trainer, load_plain = _trainer(recipe, args, data)
    _check_engine(trainer)
    trainer.accelerator.wait_for_everyone()
    checkpoint = folder.last_checkpoint()
    metrics = MetricsLog(folder.metrics, _step_of(checkpoint) if checkpoint else None)
    if args.process_index == 0:
        metrics.rewrite()
        outputs.record(recipe)
    recorder = _install_callbacks(trainer, metrics)
    if recipe.monitor and trained_rotations(trainer.model):
        RotationMonitor.attach(trainer)
    if data.eval is not None and metrics.evaluation(0) is None and checkpoint is None:
        if _prepares_once(trainer):
            trainer.args.eval_on_start = True
        else:
            trainer.evaluate()
    _fit(trainer, checkpoint)
    step = trainer.state.global_step
    if data.eval is not None and _missing_on_main(trainer, metrics, step):
        trainer.evaluate()
    summary = summarise(recipe, trainer, data, metrics, recorder)
    _save(recipe, folder, trainer, load_plain)
    if args.process_index == 0:
        outputs.write_text(folder.summary, json.dumps(summary, indent=2) + "\n")
    trainer.accelerator.wait_for_everyone()
    return Result(folder, summary, args.process_index == 0)


def _trainer(recipe: Recipe, args: Any, data: Data) -> tuple[Any, Callable]:
    """The model, adapted, in the trainer of its task; and how to load it without adapter and quantisation."""
    transformers.set_seed(recipe.seed)
    dtype = model_dtype(args)
    try:
        if recipe.task == "classification":
            tokenizer = load_tokenizer(recipe.model)
            load = functools.partial(load_classifier, recipe.model, dtype, data.labels, tokenizer)
            model = load(**quantized_loading(recipe, dtype))
            max_length = recipe.training.get("max_length") or MAX_LENGTH
            return classification_trainer(model, adapter_config(recipe), args, data, tokenizer, max_length), load
        return _sft_trainer(recipe, args, data)
    except FlashboneError:
        raise
    except (ValueError, TypeError) as error:  # PEFT's and TRL's word on a recipe that does not fit the model
        raise ConfigError(" ".join(str(error).split())) from error


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


def _sft_trainer(recipe: Recipe, args: Any, data: Data) -> tuple[Any, Callable]:
    settings = rwkv_of(recipe)
    trust = {"trust_remote_code": True} if args.trust_remote_code else {}
    tokenizer = load_tokenizer(recipe.model, settings and settings.vocabulary, **trust)
    if args.chat_template_path:
        tokenizer.chat_template, args.chat_template_path = chat_template(args.chat_template_path), None
    _check_tokenizer(recipe, tokenizer, data)
    init = args.model_init_kwargs or {}
    args.model_init_kwargs = None  # they are used here
    load = functools.partial(load_causal_lm, recipe.model, model_dtype(args), **{**trust, **init})
    model = load(**quantized_loading(recipe, model_dtype(args)))
    accept_tokens(data, args, model, recipe)
    trainer_class, along = sft_trainer_class(model, settings, args, recipe.model)
    if recipe.init_adapter is not None and along:
        raise ConfigError(f"init_adapter: it says what is trained; leave {', '.join(along)} (rwkv.train_parts) out")
    trainer = trainer_class(
        model=model if recipe.init_adapter is None else start_from(model, recipe),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        peft_config=adapter_config(recipe, along) if recipe.init_adapter is None else None,
    )
    if recipe.quantization:  # TRL makes adapters on such models bf16
        for parameter in trainer.model.parameters():  # pyright: ignore[reportOptionalMemberAccess]
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    if not args.packing:
        _report_dropped(len(data.train), len(trainer.train_dataset), args.max_length)  # pyright: ignore[reportArgumentType]
    return trainer, load


def _check_tokenizer(recipe: Recipe, tokenizer: Any, data: Data) -> None:
    if data.conversational and tokenizer.chat_template is None:
        raise ConfigError(
            f"{recipe.data.path} holds conversations, but the tokenizer of {recipe.model} has no chat template; "
            "give one with training.chat_template_path: template.jinja, or use prompt and completion columns"
        )
    if tokenizer.eos_token is None and recipe.training.get("eos_token") is None:
        raise ConfigError(
            f"the tokenizer of {recipe.model} has no end-of-text token, so answers could not be learned to stop; "
            "name one of its tokens in training.eos_token"
        )


def _report_dropped(given: int, kept: int, max_length: int | None) -> None:
    """TRL drops rows whose prompt alone fills max_length, without a word."""
    if kept == 0:
        raise ConfigError(
            f"no training row has a token of its answer within training.max_length {max_length}; raise it"
        )
    if kept < given:
        log.info(
            "data: %d of %d rows dropped: their prompts fill training.max_length %s", given - kept, given, max_length
        )


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


def _save(recipe: Recipe, folder: RunFolder, trainer: Any, load_plain: Callable) -> None:
    """Adapter and tokenizer, and the merged model if asked for; each folder appears whole."""
    main = trainer.accelerator.is_main_process
    if trainer.is_fsdp_enabled:  # of a sharded kind the Trainer would write no adapter, without a word
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.accelerator.wait_for_everyone()
    with outputs.whole_folder(folder.adapter) if main else contextlib.nullcontext(folder.adapter) as partial:
        trainer.save_model(str(partial))  # sharded models need every process here
        if main:
            trainer.processing_class.save_pretrained(partial)
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    if recipe.merge and main:
        write_merged(recipe, folder, trainer, load_plain)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _bars_if_long(recipe: Recipe):
    """No bars of `datasets` where each would be gone in a blink."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    file = Path(recipe.data.path)
    quiet = file.is_file() and file.stat().st_size < SMALL_FILE_BYTES and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            enable_progress_bars()


@contextlib.contextmanager
def _out_of_memory():
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise FlashboneError(
            "the GPU is out of memory; lower training.per_device_train_batch_size (and raise "
            f"training.gradient_accumulation_steps), or set training.gradient_checkpointing: true ({str(error)[:120]})"
        ) from error
