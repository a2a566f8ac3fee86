"""The trainer's arguments for a recipe: defaults for a first run, precision, what the launcher does not allow."""

import dataclasses
import os
from typing import Any

from flashbone import floors
from flashbone.errors import ConfigError
from flashbone.files.records import problems
from flashbone.train.data.origins import holds_out
from flashbone.train.rates import check_rates
from flashbone.train.recipe import Recipe, early_stopping_of
from flashbone.train.tasks import TASKS

_STRATEGIES = ("eval_strategy", "save_strategy")
# What transformers and TRL do not check: with some values they fail after the start, others they take for defaults.
_POSITIVE = ("num_train_epochs", "eval_steps", "save_steps", "logging_steps")
_AT_LEAST_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("save_total_limit", "eval_accumulation_steps", "pad_to_multiple_of"),
)
_LEVELS = ("passive", "debug", "info", "warning", "error", "critical", "detail")
_WORDS = {
    "packing_strategy": ("bfd", "bfd_split", "bfd-requeue", "wrapped"),
    "truncation_mode": ("keep_start", "keep_end"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
}
_OBJECTS = (  # whose types also allow text, which is not read everywhere
    *("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs"),
    *("model_init_kwargs", "dataset_kwargs"),
)
_OF_WORKERS = ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_prefetch_factor")
_NOT_NEGATIVE = (
    *("learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers", "dataset_num_proc", "eval_delay"),
    *("neftune_noise_alpha", "data_seed", "adam_beta1", "adam_beta2", "adam_epsilon"),
)


def trainer_arguments(recipe: Recipe) -> Any:
    """The arguments that the task's trainer takes, with the recipe's `training` over our defaults.

    Raises:
        ConfigError: a value is out of range, or contradicts another.
    """
    training, kind = dict(recipe.training), TASKS[recipe.task]
    check_rates(training.pop("learning_rates", {}))
    ours = {name: training.pop(name, None) for name in kind.more}
    unmeasured = training.get("eval_do_concat_batches") is False or training.get("batch_eval_metrics")
    if recipe.task == "classification" and unmeasured:
        raise ConfigError(
            "training.eval_do_concat_batches and batch_eval_metrics: a classifier is measured on all predictions at"
            " once; leave them out"
        )
    # YAML 1.1 reads `no` as false; no strategy is a truth value.
    training |= {key: "no" for key, value in training.items() if key.endswith("_strategy") and value is False}
    if wrong := problems(kind.arguments_class(), training):
        raise ConfigError("; ".join(f"training.{name}: {problem}" for name, problem in wrong.items()))
    _check_ranges(training)
    training = _checkpointing(training, recipe)
    aligned = {**_defaults(recipe), **_for_the_best(training, recipe), **training}
    try:
        args = kind.arguments_class()(**aligned, output_dir=recipe.output, seed=recipe.seed)
    except (TypeError, ValueError, ImportError, LookupError, OSError) as error:
        kind = "unknown value " if isinstance(error, LookupError) else ""
        raise ConfigError(f"training: {kind}{' '.join(str(error).split())}") from error
    _check_trackers(args.report_to)
    for name, value in ours.items():
        setattr(args, name, value)
    return args


def _check_ranges(training: dict[str, Any]) -> None:
    """Raise ConfigError that names every number and word out of range, and what others switch off."""
    import torch

    wrong = [
        f"training.{name}: got {training[name]!r}, wanted {' or '.join(words)}"
        for name, words in _WORDS.items()
        if training.get(name) is not None and training[name] not in words
    ]
    for names, is_right, wanted in (
        (_POSITIVE, lambda number: number > 0, "a number above 0"),
        (_AT_LEAST_ONE, lambda number: number >= 1, "1 or more"),
        (_NOT_NEGATIVE, lambda number: number >= 0, "0 or more"),
        (("max_steps",), lambda number: number >= 1 or number == -1, "1 or more, or -1 to go by num_train_epochs"),
    ):
        set_here = [(name, training[name]) for name in names if isinstance(training.get(name), int | float)]
        wrong += [
            f"training.{name}: got {number}, wanted {wanted}" for name, number in set_here if not is_right(number)
        ]
    texts = [name for name in _OBJECTS if isinstance(training.get(name), str)]
    wrong += [f"training.{name}: got {training[name]!r:.60}, wanted an object" for name in texts]
    if not training.get("dataloader_num_workers"):
        idle = [name for name in _OF_WORKERS if training.get(name)]
        wrong += [f"training.{name}: is for workers; set dataloader_num_workers, or leave it out" for name in idle]
    if training.get("activation_offloading") and not torch.accelerator.is_available():
        wrong.append("training.activation_offloading: moves activations off a GPU, and there is none; leave it out")
    if wrong:
        raise ConfigError("; ".join(wrong))


def check_optimizer(trainer: Any) -> None:
    """Refuse an optimiser or a schedule that cannot be made, which transformers would only notice at the first step.

    Raises:
        ConfigError: a package is missing, or an argument does not fit.
    """
    import torch
    from transformers import get_scheduler

    args = trainer.args
    try:
        kind, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        if not {"params", "model", "optimizer_dict"} & options.keys():
            kind([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"training.optim {args.optim.value}: {_reason(error)}") from None
    try:
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        get_scheduler(args.lr_scheduler_type, stand_in, 1, 10, args.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training.lr_scheduler_type {args.lr_scheduler_type.value}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _for_the_best(training: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Defaults of a run that keeps its best checkpoint: it evaluates and saves at the same steps, as the user chose for
    one of them, or ten times.

    Raises:
        ConfigError: nothing is held out, or what is wanted contradicts itself.
    """
    name, stops = "training.load_best_model_at_end", early_stopping_of(recipe) is not None
    if not training.get("load_best_model_at_end", stops):
        if stops:
            raise ConfigError(f"early_stopping: keeps the best checkpoint, but {name} is false; leave one of them out")
        return {}
    if not holds_out(recipe.data):
        raise ConfigError(f"{'early_stopping' if stops else name}: goes by held-out rows; set data.eval")
    wanted = [str(getattr(training[key], "value", training[key])) for key in _STRATEGIES if key in training]
    if "no" in wanted or len({*wanted} - {"best"}) > 1:
        raise ConfigError(
            f"{'early_stopping' if stops else name}: evaluates and saves at the same steps, but training has "
            f"{' and '.join(f'{key}: {training[key]}' for key in _STRATEGIES if key in training)}; give both the same"
        )
    strategy = next((word for word in wanted if word != "best"), "steps")
    steps = training.get("eval_steps", training.get("save_steps", 0.1))
    fields = {"load_best_model_at_end": True, "eval_strategy": strategy, "save_strategy": strategy}
    return {**fields, "eval_steps": steps, "save_steps": steps}


def _check_trackers(names: list[str]) -> None:
    """Refuse a tracker that is unknown or not installed; transformers would only when the model is loaded."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"training.report_to: got {name!r}, wanted none or {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name not in (*get_available_reporting_integrations(), "flyte"):
            extra = f"pip install flashbone[{name}]" if name in floors.extras() else "install it"
            raise ConfigError(f"training.report_to: {name} is not installed; {extra}, or leave it out")


def _defaults(recipe: Recipe) -> dict[str, Any]:
    """Our defaults for a first run; everything else is the trainer's own default."""
    import torch

    training, on_gpu = recipe.training, not trains_on_cpu(recipe)
    half = {} if "fp16" in training else {"bf16": on_gpu and torch.cuda.is_bf16_supported()}
    held_out = {"eval_strategy": "steps", "eval_steps": 0.25} if holds_out(recipe.data) else {}
    return {
        **half,
        **held_out,
        "report_to": "none",
        "learning_rate": TASKS[recipe.task].learning_rate,
        "logging_steps": 5,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a diverged run must say so
        "save_steps": 0.1,
        "save_total_limit": 2,
        "include_num_input_tokens_seen": "no" if recipe.task == "grpo" else "non_padding",
        "dataloader_pin_memory": on_gpu,
    }


def trains_on_cpu(recipe: Recipe) -> bool:
    """Whether the recipe trains without a GPU."""
    import torch

    return bool(recipe.training.get("use_cpu")) or not torch.cuda.is_available()


def _checkpointing(training: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """`training` with activations kept unless it sets otherwise; transformers 5.2x renamed gradient to activation."""
    known = {item.name for item in dataclasses.fields(TASKS[recipe.task].arguments_class())}
    new, old = "activation_checkpointing", "gradient_checkpointing"
    if new not in known:
        return {old: False, **training}
    renamed = {key.replace(old, new): value for key, value in training.items()}
    return {new: False, **renamed}


def check_launch(recipe: Recipe, args: Any) -> None:
    """Refuse what the engine cannot do that the configuration chose, or accelerate's launcher by the environment.

    Raises:
        ConfigError: a merge of a model in pieces, or accumulation that is not what the launcher told DeepSpeed.
    """
    zero = bool(args.deepspeed) or _is_set("ACCELERATE_USE_DEEPSPEED")
    if recipe.merge and (args.fsdp or zero or _is_set("ACCELERATE_USE_FSDP")):
        raise ConfigError("merge: true needs the whole model in one process; train without it, then `flashbone merge`")
    steps, wanted = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ""), args.gradient_accumulation_steps
    if zero and not args.deepspeed and steps.isdecimal() and int(steps) != wanted:
        raise ConfigError(
            f"training.gradient_accumulation_steps: got {wanted}, but accelerate's file says {steps} to DeepSpeed; give"
            " both the same number"
        )


def _is_set(flag: str) -> bool:
    return os.environ.get(flag, "").lower() in ("1", "true")


def model_dtype(args: Any) -> Any:
    """The dtype of the frozen base: the training's half precision, or float32. The adapter stays in float32."""
    import torch

    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32
