"""The recipe of a training run: its fields, how YAML and command-line overrides fill them, and which are refused."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flashbone.errors import ConfigError
from flashbone.files.plain_yaml import read_yaml, yaml_text
from flashbone.train.data.origins import DataRecipe, sources_of
from flashbone.train.fields import Schema, changed, option_of, section
from flashbone.train.rewards import ON_THE_COMMAND_LINE, Rewards
from flashbone.train.tasks import TASKS, Task, TaskKind


@dataclass
class Recipe:
    """Everything that decides a run; `adapter` and `training` go to BoneConfig and to the trainer's arguments."""

    model: str  # folder, hub id, .gguf file, or RWKV model's .pth file
    data: DataRecipe  # what is learned and what is held out: fields below
    output: str  # the run's folder
    task: Task = "sft"  # sft: a language model; dpo, kto, reward: preferences; grpo: rewards
    adapter: dict[str, Any] = field(default_factory=dict)  # fields of BoneConfig; all linear layers by default
    training: dict[str, Any] = field(default_factory=dict)  # fields of TRL's SFTConfig, or of the task's class
    init_adapter: str | None = None  # go on with this adapter: a folder, hub id, or file of RWKV-PEFT
    quantization: dict[str, Any] = field(default_factory=dict)  # the base in few bits: fields below
    rwkv: dict[str, Any] = field(default_factory=dict)  # of RWKV models: fields below
    rewards: dict[str, Any] = field(default_factory=dict)  # of grpo: fields below
    early_stopping: dict[str, Any] = field(default_factory=dict)  # end when held-out loss no longer falls: fields below
    merge: bool = False  # also write the merged model
    monitor: bool = True  # log how far the orthogonal variant turns, and how orthogonal it is
    samples: int = 3  # answers to so many held-out prompts, before and after; of a classifier rows of a wrong class
    seed: int = 42  # of the adapter's start, the order of rows, and the held-out draw


@dataclass
class Quantization:
    """The base in few bits, by bitsandbytes; the adapter stays in fp32 ("QBone").

    Raises:
        ConfigError: these do not go together.
    """

    bits: Literal[4, 8] = 4  # of each weight of the base
    type: Literal["nf4", "fp4"] | None = None  # of 4 bits: nf4 (the default) or fp4
    double: bool = False  # of 4 bits: quantise the scales, too

    def __post_init__(self) -> None:
        if self.bits == 8 and (self.type is not None or self.double):
            raise ConfigError("quantization: type and double are for 4 bits; leave them out, or set bits: 4")


@dataclass
class EarlyStoppingSettings:
    """End the run when the held-out loss, or `training.metric_for_best_model`, no longer gets better; keep the best.

    Raises:
        ConfigError: a value is out of range.
    """

    patience: int  # so many evaluations in a row without a better one
    min_delta: float = 0.0  # smaller gains do not count

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_delta < 0:
            raise ConfigError(
                f"early_stopping: got patience {self.patience} and min_delta {self.min_delta}, wanted at least 1 and 0"
            )


@dataclass
class RwkvSettings:
    """What only RWKV models have.

    Raises:
        ConfigError: a value is out of range.
    """

    vocabulary: str | None = None  # file of the tokenizer of a .pth model; that of the package rwkv when not given
    chunk_ctx: int | None = None  # train sequences in pieces of so many tokens, which hand the state on
    carry_gradient: bool = True  # with chunk_ctx: through the state to earlier pieces, too
    l2_wrap: bool = False  # keep the largest logits small, as RWKV's own training does
    # along with the adapter: ln (LayerNorms), time (time_* of v6), by RWKV-PEFT's names; state: time_state
    train_parts: list[Literal["ln", "time", "state"]] = field(default_factory=list)
    time_decay_lr: float = 2.0  # with time: the learning rate of time_decay, as a multiple of the others'

    def __post_init__(self) -> None:
        if self.chunk_ctx is not None and self.chunk_ctx < 1:
            raise ConfigError(f"rwkv.chunk_ctx: got {self.chunk_ctx!r}, wanted a number of tokens")
        if self.time_decay_lr <= 0:
            raise ConfigError(f"rwkv.time_decay_lr: got {self.time_decay_lr!r}, wanted a positive number")


# Fields that exist in the classes behind `adapter` and `training` but are decided by the recipe itself.
OURS = {
    "adapter.task_type": "set `task` instead",
    "adapter.peft_type": "it is always BONE",
    "adapter.base_model_name_or_path": "set `model` instead",
    "adapter.inference_mode": "a run always trains",
    "reward": ON_THE_COMMAND_LINE,
    "training.output_dir": "set `output` instead",
    "training.seed": "set `seed` instead",
    "training.dataset_text_field": "name the column in `data.columns: {text: ...}` instead",
    "training.resume_from_checkpoint": "use --resume instead",
}


def quantization_of(recipe: Recipe) -> Quantization | None:
    """How the base is quantised; None if it is not.

    Raises:
        ConfigError: the section has an unknown or wrong field.
    """
    return section(Quantization, "quantization", recipe.quantization)


def rwkv_of(recipe: Recipe) -> RwkvSettings | None:
    """The settings of an RWKV model; None if the recipe has none.

    Raises:
        ConfigError: the section has an unknown or wrong field.
    """
    return section(RwkvSettings, "rwkv", recipe.rwkv)


def rewards_of(recipe: Recipe) -> Rewards | None:
    """What answers are rewarded for; None if the recipe says nothing of it.

    Raises:
        ConfigError: the section has an unknown or wrong field, or the task has no rewards.
    """
    if recipe.rewards and recipe.task != "grpo":
        raise ConfigError(f"rewards: are for task grpo, not {recipe.task}; leave the section out")
    return section(Rewards, "rewards", recipe.rewards)


def early_stopping_of(recipe: Recipe) -> EarlyStoppingSettings | None:
    """When the run ends early; None if it does not.

    Raises:
        ConfigError: the section has an unknown or wrong field.
    """
    return section(EarlyStoppingSettings, "early_stopping", recipe.early_stopping)


def is_pth(name: str) -> bool:
    """Whether this names the `.pth` file of an RWKV model."""
    return name.endswith(".pth")


def check_task(recipe: Recipe) -> None:
    """Raise ConfigError where a recipe has what its task cannot have."""
    has_head, of = TASKS[recipe.task].is_classifier, "RWKV models"
    set_fields = {"rwkv": recipe.rwkv, "model": is_pth(recipe.model)}
    if has_head:
        set_fields = {"init_adapter": recipe.init_adapter is not None, **set_fields}
        of = "RWKV models and init_adapter"
    if recipe.task != "sft" and (names := [name for name, is_set in set_fields.items() if is_set]):
        remedy = "; merge the adapter into the model first" if names == ["init_adapter"] else ""
        raise ConfigError(f"{', '.join(names)}: {of} are for task sft, not {recipe.task}{remedy}")
    if wrong := list(_not_of_preferences(recipe)):
        raise ConfigError("; ".join(wrong))


def _not_of_preferences(recipe: Recipe) -> Iterator[str]:
    """What TRL takes for a task and then does not do, or undoes without a word."""
    task, training = recipe.task, recipe.training
    if task in ("sft", "classification"):
        return
    if recipe.adapter.get("dropout") and training.get("disable_dropout", True):
        yield f"adapter.dropout: task {task} turns all dropout off; set training.disable_dropout: false"
    if training.get("truncation_mode", "keep_start") == "keep_end":
        yield f"training.truncation_mode: keep_end is not for task {task}, whose two answers share their prompt"
    if training.get("padding_free"):
        yield f"training.padding_free: TRL has it off for task {task}; leave it out"
    if training.get("sync_ref_model"):
        yield "training.sync_ref_model: the reference is the model without its adapter; leave it out"
    if recipe.init_adapter is not None and training.get("precompute_ref_log_probs"):
        yield "training.precompute_ref_log_probs: not with init_adapter; leave one of them out"


# Where files are read and written; `~` and `$NAME` are understood in them.
PATHS = (
    *("model", "output", "data.path", "data.eval", "init_adapter", "rwkv.vocabulary", "training.chat_template_path"),
    *(f"training.{name}" for name in ("deepspeed", "fsdp_config", "accelerator_config")),  # or JSON, or a mapping
)


def recipe_schema(task: Any) -> Schema[Recipe]:
    """What a recipe for a task may hold."""
    sections = {
        "data": DataRecipe,
        "adapter": _bone_config(),
        "quantization": Quantization,
        "rwkv": RwkvSettings,
        "rewards": Rewards,
        "early_stopping": EarlyStoppingSettings,
        "training": arguments_class(task),
    }
    return Schema(Recipe, sections, OURS, more_arguments(task), ("data.path",), PATHS, lists={"data": "sources"})


def load_recipe(config: str | Path | None, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file with `--dotted.field value` overrides on top, or one by these alone.

    Raises:
        ConfigError: fields are unknown, missing, or of the wrong type; all of them are named.
        FormatError: the file is no YAML mapping; the message gives the line.
    """
    overrides, content = list(overrides or []), {} if config is None else read_yaml(Path(config))
    where = "the command line" if config is None else str(config)
    if ".py" in f"{content.get('rewards')} {option_of(overrides, 'rewards')}":
        raise ConfigError(f"{where}: rewards: {ON_THE_COMMAND_LINE}")
    recipe = recipe_schema(option_of(overrides, "task") or content.get("task")).fill(content, overrides, where)
    try:
        _check_seeds(
            {"seed": recipe.seed, "data.seed": recipe.data.seed, "training.data_seed": recipe.training.get("data_seed")}
        )
        quantization_of(recipe)
        rwkv_of(recipe)
        rewards_of(recipe)
        sources_of(recipe.data)
        early_stopping_of(recipe)
        if recipe.samples < 0:
            raise ConfigError(f"samples: got {recipe.samples}, wanted a number of held-out rows, or 0 for none")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return recipe


def recipe_text(recipe: Recipe) -> str:
    """A recipe as the text of a YAML file, without the fields that have their defaults, but for the seed."""
    return yaml_text(changed(recipe) | {"seed": recipe.seed})


def _check_seeds(seeds: dict[str, int | None]) -> None:
    for name, seed in seeds.items():
        if seed is not None and not 0 <= seed < 2**32:
            raise ConfigError(f"{name}: got {seed}, wanted 0 to {2**32 - 1}")


@dataclass
class AdapterSection:
    """The part of a recipe that `load_adapter_fields` reads."""

    adapter: dict[str, Any] = field(default_factory=dict)


def load_adapter_fields(config: str | Path | None, overrides: list[str]) -> dict[str, Any]:
    """The `adapter` section of a recipe, which may lack everything else, with `--adapter.field value` on top, and the
    `task_type` that the recipe's `task` means.

    Raises:
        ConfigError: fields are unknown, no fields of the adapter, or of the wrong type; all of them are named.
        FormatError: the file is no YAML mapping; the message gives the line.
    """
    where = "adapter" if config is None else str(config)
    recipe = {} if config is None else read_yaml(Path(config))
    task = recipe.get("task")
    if task is not None and task not in list(TASKS):
        raise ConfigError(f"{where}: task: got {task!r:.60}, wanted one of {', '.join(TASKS)}")
    schema = Schema(AdapterSection, {"adapter": _bone_config()}, OURS)
    merged = schema.fill({"adapter": recipe.get("adapter")}, overrides, where)
    return merged.adapter | ({} if task is None else {"task_type": TASKS[task].task_type})


def arguments_class(task: Any) -> type:
    """The class that `training` is passed to."""
    return _kind(task).arguments_class()


def more_arguments(task: Any) -> dict[str, Any]:
    """Names in `training` beyond the fields of that class, with their types."""
    strategies: dict[str, Any] = {
        f"training.{name}_strategy": str | bool for name in ("eval", "save", "logging")
    }  # YAML's `no`
    strategies["training.learning_rates"] = dict[str, float]
    return strategies | {f"training.{name}": kind for name, kind in _kind(task).more.items()}


def _kind(task: Any) -> TaskKind:
    """The task's entry; a name that is none is reported with the recipe's other fields."""
    return next((kind for name, kind in TASKS.items() if name == task), TASKS["sft"])


def _bone_config() -> type:
    import peft  # noqa: F401  # first, since BONE is registered when peft has been imported

    from flashbone import BoneConfig

    return BoneConfig
