"""An adapter on a model: a new one as the recipe describes it, or a saved one of any format, by PEFT."""

import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import peft

from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.files import names, reading
from flashbone.files import peft as peft_files
from flashbone.files.adapter import Adapter
from flashbone.files.fields import refuse_slow_patterns, settle_patterns
from flashbone.files.sources import read_json, refuse_special
from flashbone.train.recipe import Recipe
from flashbone.train.tasks import TASKS

log = logging.getLogger(__name__)


def adapter_config(recipe: Recipe, *also_trained: dict[str, list[str]]) -> Any:
    """The recipe's BoneConfig; all linear layers when no target is given.

    Args:
        recipe: The recipe.
        also_trained: More entries for fields that are lists of names, such as `modules_to_save`.
    """
    from flashbone import BoneConfig

    fields = {"target_modules": "all-linear", **recipe.adapter}
    for name, entries in itertools.chain.from_iterable(more.items() for more in also_trained):
        fields[name] = list(dict.fromkeys([*(fields.get(name) or ()), *entries]))
    try:
        return BoneConfig(**fields, task_type=TASKS[recipe.task].task_type)
    except TypeError as error:
        raise ConfigError(f"adapter: {error}") from error


def saved_along(model: Any, recipe: Recipe) -> dict[str, list[str]]:
    """What the recipe's adapter has to save whole besides, for `adapter_config`: modules that the checkpoint lacks,
    which start at other random numbers whenever it is loaded, and a classifier's head, whatever its name.

    Args:
        model: As it was loaded.
        recipe: The recipe.

    Raises:
        ConfigError: a parameter that the checkpoint lacks belongs to the model itself; or the base is quantised, so
            that what it lacks cannot be trained.
    """
    from flashbone.tuner.model.whole import head_modules, modules_to_add, unsaved_modules

    added, new = modules_to_add(model, adapter_config(recipe)), unsaved_modules(model, [])
    heads = head_modules(model) if TASKS[recipe.task].is_classifier else []
    packed = [module for module in new if module.partition(".")[0] not in heads]
    if packed and recipe.quantization:
        raise ConfigError(
            f"quantization: the checkpoint of {recipe.model} has no {', '.join(packed)}, which would have to be"
            " trained whole; leave quantization out"
        )
    if new:
        names = ", ".join(new)
        log.info("model %s: its checkpoint has no %s; trained whole, and saved with the adapter", recipe.model, names)
    return {"modules_to_save": added}


def start_from(model: Any, recipe: Recipe) -> Any:
    """The model with the recipe's `init_adapter`, to be trained further.

    Raises:
        ConfigError: the recipe has a section for the adapter, too; or the adapter is of another method, or missing.
        FormatError, ShapeError: the adapter cannot be read, or does not fit the model.
    """
    assert recipe.init_adapter is not None
    if recipe.adapter:
        names = ", ".join(f"adapter.{name}" for name in recipe.adapter)
        raise ConfigError(f"init_adapter describes the adapter; leave {names} out")
    path = Path(recipe.init_adapter).expanduser()
    with tempfile.TemporaryDirectory() as folder:
        place = recipe.init_adapter  # perhaps a hub id
        if path.exists():
            place = folder
            form, _ = reading.recognise(path)
            if form.holds is not Adapter:
                raise ConfigError(
                    f"init_adapter {recipe.init_adapter}: is a {form.peft_type} adapter, not a Bone one; `flashbone"
                    " convert --to peft` makes one of it if its A is fixed"
                )
            peft_files.write(reading.read_adapter(path), Path(folder))
        try:
            config = peft.PeftConfig.from_pretrained(place)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"init_adapter {recipe.init_adapter}: no such file or folder, and no adapter of that hub id could be"
                f" loaded ({' '.join(str(error).split())[:200]})"
            ) from None
        if config.peft_type != "BONE":
            raise ConfigError(f"init_adapter {recipe.init_adapter}: is a {config.peft_type} adapter, not a Bone one")
        config.task_type = TASKS[recipe.task].task_type  # pyright: ignore[reportAttributeAccessIssue]
        config.base_model_name_or_path = model.name_or_path
        return peft.PeftModel.from_pretrained(model, place, config=config, is_trainable=True)


def attach_adapter(model: Any, adapter: Path, task_type: str, merge: bool = False) -> Any:
    """The model with an adapter to infer with, active and unmerged unless `merge` is asked for.

    Args:
        model: A plain model.
        adapter: A folder of any of PEFT's methods, or an adapter of another format of the family.
        task_type: PEFT's name of the task; an adapter of another one is refused.
        merge: Put the adapter into the weights, and return the plain model.

    Raises:
        ConfigError: no such adapter, or it is for another task, or lacks what the model's checkpoint lacks, too, such
            as a classification head.
        FormatError, ShapeError: it cannot be read, or does not fit the model.
    """
    adapted = attach_adapters(model, {"default": adapter}, task_type)
    return adapted.merge_and_unload() if merge else adapted


def attach_adapters(model: Any, adapters: Mapping[str, Path], task_type: str) -> Any:
    """The model with several adapters of one method to infer with, unmerged, by these names; the first is active.

    Raises:
        ConfigError: as `attach_adapter`; or they are of several methods.
        FormatError, ShapeError: as there.
    """
    with ExitStack() as stack:
        loaded = []
        for name, adapter in adapters.items():
            folder = stack.enter_context(_peft_folder(adapter))
            with _misfits(adapter):
                loaded.append((name, adapter, folder, _config_for(model, folder, adapter, task_type)))
        kinds = [getattr(config.peft_type, "value", config.peft_type) for *_, config in loaded]
        if len(set(kinds)) > 1:
            names = ", ".join(f"{adapter} ({kind})" for (_, adapter, *_), kind in zip(loaded, kinds, strict=True))
            raise ConfigError(
                f"adapters of several methods cannot be on one model: {names}; `flashbone convert --to peft` makes one"
                " of the family BONE"
            )
        adapted: Any = None
        for name, adapter, folder, config in loaded:
            with _misfits(adapter), same_compilers():
                if adapted is None:
                    _grow_vocabulary(model, folder)
                    adapted = peft.PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=config)
                else:
                    adapted.load_adapter(str(folder), adapter_name=name)
        return adapted


def _config_for(model: Any, folder: Path, adapter: Path, task_type: str) -> Any:
    """The adapter's configuration, if it is one for this task and model."""
    config = peft.PeftConfig.from_pretrained(str(folder))
    task = getattr(config.task_type, "value", config.task_type)
    if task is not None and task != task_type:
        remedy = "use flashbone eval --classification" if task == "SEQ_CLS" else f"a {task_type} adapter was wanted"
        raise ConfigError(f"adapter {adapter}: was trained for the task {task}; {remedy}")
    _refuse_random_modules(model, config, adapter)
    if config.peft_type != "BONE":
        settle_patterns(config, [name for name, _ in model.named_modules()])
    return config


def _refuse_random_modules(model: Any, config: Any, adapter: Path) -> None:
    from flashbone.tuner.model.whole import unsaved_modules

    if random := unsaved_modules(model, list(getattr(config, "modules_to_save", None) or ())):
        names = ", ".join(name or "parameters of its own" for name in random)
        raise ConfigError(
            f"adapter {adapter}: brings no {names}, and neither does the checkpoint of {model.name_or_path}, so they"
            " would be random numbers; use the base that the adapter was trained on, or train again"
        )


def _grow_vocabulary(model: Any, folder: Path) -> None:
    """Give the model as many embeddings as the adapter saved."""
    saved = peft.load_peft_weights(str(folder), device="cpu")
    rows = [len(value) for name, value in saved.items() if names.is_embedding(name, names.INPUT_EMBEDDINGS)]
    if rows and rows[0] > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows[0], mean_resizing=False)


@contextmanager
def same_compilers() -> Iterator[None]:
    """Restore CC and CXX: PEFT's BOFT leaves both at gcc where its CUDA extension cannot be built, and what Inductor
    compiles afterwards, here or in processes that inherit them, would not be linked to libstdc++."""
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _peft_folder(adapter: Path) -> Iterator[Path]:
    """Where PEFT finds the adapter: its own folder, or one that is made of another format for the time being."""
    refuse_special(adapter)
    if (config := adapter / peft_files.CONFIG).is_file():
        refuse_slow_patterns(config, read_json(config))
        yield adapter
        return
    if not adapter.exists():
        raise ConfigError(f"adapter {adapter}: no such file or folder")
    with tempfile.TemporaryDirectory() as folder:
        peft_files.write(reading.read_adapter(adapter), Path(folder))
        yield Path(folder)


@contextmanager
def _misfits(adapter: Path) -> Iterator[None]:
    """One error for whatever PEFT raises when an adapter does not fit; of missing tensors it would only warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
        try:
            yield
        except FlashboneError:
            raise
        except (ValueError, RuntimeError, KeyError, TypeError, OSError, UserWarning) as error:
            text = " ".join(str(error).split())[:300]
            raise FormatError(f"adapter {adapter}: does not fit the model, or is broken: {text}") from error
