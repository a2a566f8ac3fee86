"""The recipe of a training run: its fields, how YAML and command-line overrides fill them, and what is refused."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flashbone.errors import ConfigError
from flashbone.train.fields import (
    check_names,
    field_names,
    flag_names,
    keys,
    numbers,
    one_line,
    parse,
    read_yaml,
    refuse_classes,
)
from flashbone.train.sections import Quantization, RwkvSettings, section

Task = Literal["sft", "classification"]
TASK_TYPES: dict[Task, str] = {"sft": "CAUSAL_LM", "classification": "SEQ_CLS"}  # as PEFT calls them


@dataclass
class DataRecipe:
    """Where the examples come from and how a row becomes one."""

    path: str  # .json, .jsonl, .csv, .parquet, .bin/.idx, or a dataset's hub id or folder
    eval: int | float | str | None = 0.1  # held out: a share, a number of rows, another file, or nothing
    format: str = "auto"  # of the rows, as in docs/training.md; auto goes by the columns
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the data's name
    split: str = "train"  # also slices: train[:5000]
    subset: str | None = None  # configuration of a hub dataset
    turns: Literal["all", "last"] = "all"  # which answers of a conversation are learned
    template: str | None = None  # around each prompt, which stands for {prompt} in it
    seed: int | None = None  # of the held-out draw; the run's seed when not given


@dataclass
class Recipe:
    """Everything that decides a run; `adapter` and `training` go to BoneConfig and to the trainer's arguments."""

    model: str  # folder, hub id, .gguf file, or RWKV model's .pth file
    data: DataRecipe  # what is learned and what is held out: fields below
    output: str  # the run's folder
    task: Task = "sft"  # sft: a language model
    adapter: dict[str, Any] = field(default_factory=dict)  # fields of BoneConfig; all linear layers if nothing is said
    training: dict[str, Any] = field(default_factory=dict)  # fields of SFTConfig (sft) or TrainingArguments
    init_adapter: str | None = None  # go on with this adapter: a folder, hub id, or file of RWKV-PEFT
    quantization: dict[str, Any] = field(default_factory=dict)  # the base in few bits: fields below
    rwkv: dict[str, Any] = field(default_factory=dict)  # of RWKV models: fields below
    merge: bool = False  # also write the merged model
    monitor: bool = True  # log how far the orthogonal variant turns, and how orthogonal it is
    seed: int = 42  # of the adapter's start, the order of rows, and the held-out draw


# Fields that exist in the classes behind `adapter` and `training` but are decided by the recipe itself.
OURS = {
    "adapter.task_type": "set `task` instead",
    "adapter.peft_type": "it is always BONE",
    "adapter.base_model_name_or_path": "set `model` instead",
    "adapter.inference_mode": "a run always trains",
    "training.output_dir": "set `output` instead",
    "training.seed": "set `seed` instead",
    "training.resume_from_checkpoint": "use --resume instead",
}


def quantization_of(recipe: Recipe) -> Quantization | None:
    """How the base is quantised; None where nothing says so.

    Raises:
        ConfigError: the recipe's section makes no sense.
    """
    return section(Quantization, "quantization", recipe.quantization)


def rwkv_of(recipe: Recipe) -> RwkvSettings | None:
    """What is asked of an RWKV model; None where nothing is said.

    Raises:
        ConfigError: the recipe's section makes no sense.
    """
    return section(RwkvSettings, "rwkv", recipe.rwkv)


SECTIONS = ("data", "adapter", "training", "quantization", "rwkv")


def load_recipe(config: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file with `--dotted.field value` overrides on top.

    Raises:
        ConfigError: a field is unknown (all of them are named), missing, or of the wrong type.
        FormatError: the file is no YAML mapping; the message gives the line.
    """
    overrides = list(overrides or [])
    given = read_yaml(Path(config))
    _refuse_unknown(keys(given, SECTIONS) + flag_names(overrides), given.get("task"), str(config))
    _require(given, overrides, str(config))
    return _parse(given, overrides, str(config))


def load_adapter_fields(config: str | Path | None, overrides: list[str]) -> dict[str, Any]:
    """The `adapter` section of a recipe, which may lack everything else, with `--adapter.field value` on top, and the
    `task_type` that the recipe's `task` means.

    Raises:
        ConfigError: a field is unknown (all of them are named), no field of the adapter, or of the wrong type.
        FormatError: the file is no YAML mapping; the message gives the line.
    """
    import argparse

    from jsonargparse import ArgumentParser

    where = "adapter" if config is None else str(config)
    recipe = {} if config is None else read_yaml(Path(config))
    section, task = recipe.get("adapter"), recipe.get("task")
    if task is not None and task not in list(TASK_TYPES):
        raise ConfigError(f"{where}: task: got {task!r}, wanted one of {', '.join(TASK_TYPES)}")
    if not isinstance(section, dict | None):
        raise ConfigError(f"{where}: adapter: got {section!r}, wanted a mapping of BoneConfig's fields")
    given = {"adapter": section or {}}
    check_names(keys(given, SECTIONS) + flag_names(overrides), ["adapter", *_adapter_names()], where, OURS)
    refuse_classes(given, overrides, where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--adapter", type=dict[str, Any], default={})
    try:
        merged = parser.parse_args(overrides, namespace=parser.parse_object(given))
    except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        raise ConfigError(f"{where}: {one_line(str(error))}") from None
    inside = [f"adapter.{name}" for name in merged.adapter]  # of `--adapter {...}`, too
    check_names(inside, _adapter_names(), where, OURS)
    return numbers(merged.adapter) | ({} if task is None else {"task_type": TASK_TYPES[task]})


def arguments_class(task: Any) -> type:
    """The class that `training` is passed to."""
    if task == "classification":
        from transformers import TrainingArguments

        return TrainingArguments
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig


def _refuse_unknown(names: list[str], task: Any, where: str) -> None:
    """Raise one ConfigError that names every field which nothing would read, with the nearest that exist."""
    known = field_names(Recipe)
    known += [f"data.{name}" for name in field_names(DataRecipe)]
    known += _adapter_names()
    known += [f"quantization.{name}" for name in field_names(Quantization)]
    known += [f"rwkv.{name}" for name in field_names(RwkvSettings)]
    known += [f"training.{name}" for name in field_names(arguments_class(task))]
    if task == "classification":
        known.append("training.max_length")  # ours: transformers' arguments have none
    check_names(names, known, where, OURS)


def _adapter_names() -> list[str]:
    import peft  # noqa: F401  # first, since BONE is registered when peft has been imported

    from flashbone import BoneConfig

    return [f"adapter.{name}" for name in field_names(BoneConfig)]


def _parse(given: dict[str, Any], overrides: list[str], where: str) -> Recipe:
    recipe = parse(Recipe, given, overrides, where, SECTIONS)
    try:
        quantization_of(recipe)
        rwkv_of(recipe)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return recipe


def _require(given: dict[str, Any], overrides: list[str], where: str) -> None:
    flags = flag_names(overrides)
    data = given.get("data")
    missing = [name for name in ("model", "output") if given.get(name) is None and name not in flags]
    if not (isinstance(data, dict) and data.get("path") is not None) and "data.path" not in flags:
        missing.append("data.path")
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
