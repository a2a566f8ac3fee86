"""From a recipe to a trainer that is ready: tokenizer, model, adapter, and the rows as the trainer wants them."""

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import transformers
from peft import get_peft_model

from flashbone.errors import ConfigError, FlashboneError
from flashbone.train import preferring
from flashbone.train.adapters import adapter_config, saved_along, start_from
from flashbone.train.arguments import model_dtype
from flashbone.train.classify import classification_trainer
from flashbone.train.data.images import has_images
from flashbone.train.data.loading import Data
from flashbone.train.data.origins import elsewhere, sources_of
from flashbone.train.data.places import places
from flashbone.train.data.prepared import Counts, Limits, check, prepare
from flashbone.train.data.streaming import prepare_stream
from flashbone.train.lengths import fitting_length
from flashbone.train.models import load_causal_lm, load_classifier, quantized_loading, trust_of, without_weights
from flashbone.train.rates import set_rates
from flashbone.train.recipe import DataRecipe, Recipe, RwkvSettings, is_pth, rewards_of, rwkv_of
from flashbone.train.rewards import Reward
from flashbone.train.tasks import TASKS
from flashbone.train.tokenizers import load_tokenizer, stop_at, training_tokenizer
from flashbone.train.vision import load_processor, with_images

log = logging.getLogger(__name__)

Adapt = Callable[[Any], Any]


def build_trainer(
    recipe: Recipe,
    args: Any,
    data: Data,
    adapt: Adapt | None = None,
    has_weights: bool = True,
    reward: Reward | None = None,
) -> tuple[Any, Callable[[], Any]]:
    """The model, adapted, in the trainer of its task; and how to load it without adapter and quantisation.

    Args:
        recipe: The recipe.
        args: The trainer's.
        data: The rows; test rows are made ready like held-out ones and left in `trainer.test_dataset`.
        adapt: Makes the model that trains out of the loaded one; None for the recipe's adapter.
        has_weights: Load the model's weights; without them everything else is built.
        reward: A function that rewards answers, besides those of the recipe.

    Raises:
        ConfigError: the recipe does not fit the model.
    """
    transformers.set_seed(recipe.seed)
    rewarded = functools.partial(_language_trainer, reward=reward)
    build = {"classification": _classification_trainer, "reward": _reward_trainer}.get(recipe.task, rewarded)
    try:
        trainer, load = build(recipe, args, data, adapt, has_weights)
    except FlashboneError:
        raise
    except ValueError as error:  # PEFT or TRL refuses a recipe that does not fit the model
        raise ConfigError(" ".join(str(error).split())) from error
    except TypeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"adapter or training: a value of the wrong type ({reason})") from error
    if rates := recipe.training.get("learning_rates"):
        set_rates(trainer, rates)
    if data.test is not None:
        trainer.eval_dataset, trainer.test_dataset = trainer.eval_dataset["held_out"], trainer.eval_dataset["test"]
    return trainer, load


def _held_out(data: Data) -> Any:
    """What a trainer gets to evaluate, and so to make ready."""
    return data.eval if data.test is None else {"held_out": data.eval, "test": data.test}


def _classification_trainer(
    recipe: Recipe, args: Any, data: Data, adapt: Adapt | None, has_weights: bool
) -> tuple[Any, Callable]:
    tokenizer = load_tokenizer(recipe.model)
    model, load = _classifier(recipe, model_dtype(args), data.labels, tokenizer, has_weights)
    if adapt is None:
        adapted = get_peft_model(model, adapter_config(recipe, saved_along(model, recipe)))
    else:
        adapted = adapt(model)
    return classification_trainer(adapted, args, data, _held_out(data), tokenizer, args.max_length), load


def _classifier(
    recipe: Recipe, dtype: Any, labels: list[str], tokenizer: Any, has_weights: bool
) -> tuple[Any, Callable]:
    load = functools.partial(load_classifier, recipe.model, dtype, labels, tokenizer)
    model = load(**quantized_loading(recipe, dtype)) if has_weights else without_weights(load, recipe, dtype, labels)
    if model.config.is_encoder_decoder and tokenizer.eos_token_id not in tokenizer("")["input_ids"]:
        raise ConfigError(
            f"model {recipe.model}: {type(model).__name__} classifies at the end token, which its tokenizer does not"
            " write; use a tokenizer that does"
        )
    return model, load


def _reward_trainer(
    recipe: Recipe, args: Any, data: Data, adapt: Adapt | None, has_weights: bool
) -> tuple[Any, Callable]:
    """A model with one output, which is higher for better answers; its head is new, and trained whole."""
    tokenizer = training_tokenizer(recipe, args, None, data.conversational, ends=False)
    model, load = _classifier(recipe, model_dtype(args), ["reward"], tokenizer, has_weights)
    data, (learned, *_) = tokenised(recipe, args, data, tokenizer, model)
    data = preferring.as_trl_takes_them(recipe.task, data, args)
    args.model_init_kwargs = None
    trainer = preferring.trainer_class(recipe.task)(
        model=get_peft_model(model, adapter_config(recipe, saved_along(model, recipe))),
        args=args,
        train_dataset=data.train,
        eval_dataset=_held_out(data),
        processing_class=tokenizer,
    )
    if recipe.quantization:
        preferring.keep_float(trainer)
    trainer.row_counts = learned
    return trainer, load


def _language_trainer(
    recipe: Recipe, args: Any, data: Data, adapt: Adapt | None, has_weights: bool, reward: Reward | None
) -> tuple[Any, Callable]:
    settings = rwkv_of(recipe)
    tokenizer = training_tokenizer(recipe, args, settings and settings.vocabulary, data.conversational)
    init = args.model_init_kwargs or {}
    args.model_init_kwargs = None  # they are used here
    load = functools.partial(load_causal_lm, recipe.model, model_dtype(args), **{**trust_of(args), **init})
    quantized = quantized_loading(recipe, model_dtype(args))
    model = load(**quantized) if has_weights else without_weights(load, recipe, model_dtype(args))
    trainer_class, along = _trainer_class(recipe, model, settings, args)
    asked = data
    processor = load_processor(recipe, args, tokenizer, adapt is None) if has_images(data.train) else tokenizer
    make_ready = tokenised if processor is tokenizer else with_images
    data, (learned, *_) = make_ready(recipe, args, data, processor, model)
    stops_anew = stop_at(model, tokenizer, learned.ends)
    if recipe.task == "sft":
        args.assistant_only_loss = args.assistant_only_loss and not data.conversational
        if processor is tokenizer and not (args.packing or args.eval_packing or args.shuffle_dataset):
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    elif recipe.task == "grpo":
        data = preferring.prompts(asked, learned, args)
        trainer_class = functools.partial(trainer_class, reward_funcs=reward_functions(recipe, reward))
    else:
        data = preferring.as_trl_takes_them(recipe.task, data, args)
    if along and (recipe.init_adapter is not None or adapt is not None):
        which = "init_adapter: it says" if adapt is None else "methods: they say"
        raise ConfigError(f"{which} what is trained; leave {', '.join(along)} (rwkv.train_parts) out")
    peft_config = None
    if adapt is not None:
        model = adapt(model)
    elif recipe.init_adapter is not None:
        model = start_from(model, recipe)
    else:
        peft_config = adapter_config(recipe, saved_along(model, recipe), along)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=_held_out(data),
        processing_class=processor,
        peft_config=peft_config,
    )
    if recipe.quantization:
        preferring.keep_float(trainer)
    if preferring.START in getattr(trainer.model, "peft_config", ()):
        preferring.keep_start(trainer)
    trainer.reward_sha256 = getattr(reward, "sha256", None)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.stops_anew, trainer.row_counts = stops_anew, learned  # pyright: ignore[reportAttributeAccessIssue]
    return trainer, load


def reward_functions(recipe: Recipe, reward: Reward | None) -> list[Reward]:
    """What rewards answers: what the recipe names, and then the function.

    Raises:
        ConfigError: there is nothing.
    """
    settings = rewards_of(recipe)
    functions = [*(settings.functions() if settings else ()), *([reward] if reward else ())]
    if not functions:
        raise ConfigError(
            "rewards: task grpo needs some: exact_match: true, regex: ... or length: ... in this section, or --reward"
            " file.py:function on the command line"
        )
    return functions


def _trainer_class(
    recipe: Recipe, model: Any, settings: RwkvSettings | None, args: Any
) -> tuple[Callable[..., Any], dict[str, list[str]]]:
    """The trainer for a language model, and what is trained along, as fields of BoneConfig.

    Raises:
        ConfigError: settings of RWKV for another model, or ones that do not fit this one.
    """
    name = recipe.model
    if not str(getattr(model.config, "model_type", "")).startswith("rwkv_x0"):
        if settings is not None:
            raise ConfigError(f"rwkv: {name} is a {type(model).__name__}, no RWKV-6 or RWKV-7; leave the section out")
        if recipe.task == "sft":
            return TASKS["sft"].trainer_class(), {}
        return preferring.trainer_class(recipe.task), {}
    if recipe.task != "sft":
        raise ConfigError(f"model {name}: RWKV models are for task sft, not {recipe.task}")
    from flashbone.train import rwkv

    settings = settings or RwkvSettings()
    if settings.vocabulary is not None and not is_pth(name):
        raise ConfigError(f"rwkv.vocabulary: {name} is a folder, which has its own tokenizer; leave it out")
    return functools.partial(rwkv.RwkvTrainer, settings=settings), rwkv.prepare(model, settings, args)


def limits_of(args: Any, model: Any, tokenizer: Any) -> Limits:
    """What rows have to fit, by the trainer's arguments after `limit_length`, the model and its tokenizer.

    Raises:
        ConfigError: the model does not know the padding token.
    """
    length = args.max_length
    if length is None and getattr(
        args, "padding_free", False
    ):  # where TRL takes no length, and the model still has its positions
        length = fitting_length(None, None, model.config, tokenizer.model_max_length, "training.max_length")
    known, padding = model.get_input_embeddings().num_embeddings, tokenizer.pad_token_id
    if padding is not None and padding >= known:
        raise ConfigError(
            f"the tokenizer's padding token {tokenizer.pad_token!r} has the id {padding}, but the model has {known}"
            " embeddings; set pad_token in tokenizer_config.json to a token that the model knows"
        )
    packs = (
        getattr(args, "packing", False) and args.packing_strategy != "bfd"
    )  # nothing is cut off where rows are split
    if hasattr(args, "max_completion_length") and length is not None:
        length -= args.max_completion_length or 0
    return Limits(
        length=None if packs else length,
        keep_end=getattr(args, "truncation_mode", None) == "keep_end",
        embeddings=known,
        learn_all=getattr(args, "completion_only_loss", None) is False,
    )


def tokenised(recipe: Recipe, args: Any, data: Data, tokenizer: Any, model: Any) -> tuple[Data, list[Counts]]:
    """The data as the trainer of a language model takes it, and what became of the rows of each part.

    Args:
        recipe: The recipe.
        args: The trainer's, after `limit_length`.
        data: The rows.
        tokenizer: From `training_tokenizer`.
        model: It may be one without weights.

    Raises:
        FormatError: the chat template refuses rows, or a token has no embedding; the first few are named.
        ConfigError: nothing is left to learn, too much is cut, or answers have no end.
    """
    limits, learned = limits_of(args, model, tokenizer), sources_of(recipe.data)
    apart = elsewhere(recipe.data, recipe.data.eval)
    held_out = [apart] if apart else [elsewhere(place, place.eval) or place for place in learned]
    parts, counts = [], []
    all_rows: list[Any] = [(data.train, learned, "training"), (data.eval, held_out, "held-out")]
    for rows, of, kind in [*all_rows, (data.test, learned, "test")]:
        if rows is None:
            parts.append(None)
            continue
        with args.main_process_first():
            if kind == "training" and data.is_stream:
                made, count, rows = prepare_stream(rows, tokenizer, limits, data.counted)
            else:
                made, count = prepare(rows, tokenizer, limits, getattr(args, "dataset_num_proc", None))
        find = functools.partial(_places, of, recipe.task, rows)
        where = ", ".join(dict.fromkeys(place.path for place in of))
        check(count, where, kind, limits.length, recipe.data.allow_cut, find)
        parts.append(made)
        counts.append(count)
    return replace(data, train=parts[0], eval=parts[1], test=parts[2]), counts


def _places(origins: list[DataRecipe], task: str, rows: Any, numbers: list[int]) -> list[str]:
    """Where the rows of these numbers are."""
    if min(numbers) < 0:
        return [", ".join(dict.fromkeys(origin.path for origin in origins))]
    wanted = [{name: value for name, value in rows[number].items() if value is not None} for number in numbers]
    where = [""] * len(wanted)
    for origin in origins:
        for number, place in enumerate(places(origin, task, wanted)):
            if where[number] in ("", *(origin.path for origin in origins)):
                where[number] = place
    return where
