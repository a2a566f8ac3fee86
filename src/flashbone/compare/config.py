"""The configuration of a comparison: its fields, how YAML and command-line overrides fill them, and what is refused."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flashbone.compare.methods import METHODS
from flashbone.errors import ConfigError
from flashbone.files.plain_yaml import read_yaml
from flashbone.train.fields import Schema, check_names, option_of
from flashbone.train.recipe import (
    OURS,
    PATHS,
    DataRecipe,
    Quantization,
    Recipe,
    RwkvSettings,
    arguments_class,
    check_task,
    more_arguments,
    section,
)

ComparedTask = Literal["sft", "classification"]
Metric = Literal["auto", "loss", "accuracy", "exact_match"]


@dataclass
class ComparedData(DataRecipe):
    """Rows to learn from, rows held out, by which learning rates are chosen, and rows for the test at the end.

    The three parts are the same in all runs: `seed` decides the draws, not the seeds of the runs.
    """

    # scored once at the end of each run: a share, a number of rows, a file, or where and how (path...)
    test: int | float | str | dict[str, Any] | None = None
    seed: int | None = 0  # of the draws of held-out and test rows


@dataclass
class Answers:
    """How the model answers the test rows, greedily: for the metric exact_match, or to have it beside the loss.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int = 256  # longest answer
    batch_size: int = 16  # questions at once

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"answers.{name}: got {value!r}, wanted a number of at least 1")


@dataclass
class ComparisonConfig:
    """Everything that decides a comparison; each method trains with the same `training`, but its own learning rates."""

    model: str  # folder, hub id, .gguf file, or RWKV model's .pth file
    data: ComparedData  # rows to learn from, to choose by and to test with: fields below
    output: str  # folder of the results, the report and all runs
    task: ComparedTask = "sft"  # sft: a language model
    # names, or mappings with method, label, learning_rates, and fields of that method's configuration
    methods: list[str | dict[str, Any]] = field(default_factory=lambda: ["bone", "lora", "miss"])
    # what all adapters are matched to: a method with its size, or a number of parameters
    budget: int | dict[str, Any] = field(default_factory=lambda: {"method": "bone", "r": 64})
    tolerance: float = 0.03  # how far the sizes of two matched adapters may lie apart
    target_modules: str | list[str] = "all-linear"  # of all methods
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])  # each method tries all of them
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # the first chooses the rate, the others repeat it
    training: dict[str, Any] = field(default_factory=dict)  # fields of SFTConfig or TrainingArguments
    quantization: dict[str, Any] = field(default_factory=dict)  # as in `flashbone train`
    rwkv: dict[str, Any] = field(default_factory=dict)  # as in `flashbone train`
    metric: Metric = "auto"  # of the test: accuracy (classification) or loss (sft) by default
    answers: dict[str, Any] = field(default_factory=dict)  # of language models, for exact_match: fields below
    # runs at the same time, each on a GPU of its own, or with a share of the threads; ray: as tasks of a Ray cluster
    jobs: int | Literal["ray"] = 1

    @property
    def test_metric(self) -> Literal["loss", "accuracy", "exact_match"]:
        """What the test measures: loss, accuracy or exact_match."""
        if self.metric != "auto":
            return self.metric
        return "loss" if self.task == "sft" else "accuracy"


@dataclass(frozen=True)
class ListedMethod:
    """One line of `methods`.

    Attributes:
        label: its name in results, unlike all others.
        method: of `METHODS`.
        settings: fields of the method's configuration that the user decides.
        learning_rates: what is tried, in rising order.
    """

    label: str
    method: str
    settings: dict[str, Any]
    learning_rates: tuple[float, ...]


_SECTIONS = {"data": ComparedData, "quantization": Quantization, "rwkv": RwkvSettings, "answers": Answers}
_NOT_HERE = {
    "data.sources": "a comparison has one place of rows",
    "data.streaming": "a comparison counts its rows",
    "training.learning_rate": "set `learning_rates` instead",
    "training.learning_rates": "each run has one rate for all; set `learning_rates` instead",
    "training.output_dir": "set `output` instead",
    "training.seed": "set `seeds` instead",
    "training.resume_from_checkpoint": "a comparison resumes by itself",
}
_DECIDED = (
    "eval_strategy",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "eval_packing",
    "shuffle_dataset",
)
_OF_TEST = ("path", "format", "columns", "split", "subset", "turns", "template")
_ENTRY = ("method", "label", "learning_rates")


def test_part(data: Mapping[str, Any]) -> int | float | str | DataRecipe | None:
    """`data.test` as `load_data` takes it; options of the other rows do not apply to it.

    Raises:
        ConfigError: it names unknown fields, or no path.
    """
    test = data["test"]
    if not isinstance(test, Mapping):
        return test
    check_names([f"data.test.{name}" for name in test], [f"data.test.{name}" for name in _OF_TEST], "data", {})
    if not isinstance(test.get("path"), str):
        raise ConfigError(f"data.test: got {dict(test)}, wanted a path")
    return DataRecipe(**test)


def load_comparison(config: str | Path, overrides: list[str] | None = None) -> ComparisonConfig:
    """The comparison in a YAML file with `--dotted.field value` overrides on top.

    Raises:
        ConfigError: a field is unknown (all of them are named), missing, or of the wrong type or range.
        FormatError: the file is not a YAML mapping; the message gives the line.
    """
    overrides, content = list(overrides or []), read_yaml(Path(config))
    where, task = str(config), option_of(overrides, "task") or content.get("task")
    comparison = comparison_schema(task).fill(content, overrides, where)
    try:
        check(comparison)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return comparison


def comparison_schema(task: Any) -> Schema[ComparisonConfig]:
    """What a comparison for a task may hold."""
    return Schema(
        ComparisonConfig,
        {**_SECTIONS, "training": arguments_class(task)},
        {**OURS, **_NOT_HERE},
        more_arguments(task),
        required=("data.path", "data.test"),
        paths=(*(name for name in PATHS if name != "init_adapter"), "data.test", "data.test.path"),
    )


def check(comparison: ComparisonConfig) -> None:
    """Refuse what contradicts itself.

    Raises:
        ConfigError: naming the first thing that does.
    """
    listed_methods(comparison)
    section(Quantization, "quantization", comparison.quantization)
    section(RwkvSettings, "rwkv", comparison.rwkv)
    section(Answers, "answers", comparison.answers)
    test_part(dataclasses.asdict(comparison.data))
    if not comparison.data.eval:
        raise ConfigError("data.eval: learning rates are chosen by held-out rows; give a share, a number or a file")
    if not comparison.seeds or len(set(comparison.seeds)) != len(comparison.seeds):
        raise ConfigError(f"seeds: got {comparison.seeds}, wanted one or more different numbers")
    if comparison.jobs != "ray" and comparison.jobs < 1:
        raise ConfigError(f"jobs: got {comparison.jobs}, wanted at least 1, or ray")
    if not 0 < comparison.tolerance < 1:
        raise ConfigError(f"tolerance: got {comparison.tolerance}, wanted a share such as 0.03")
    if (comparison.test_metric == "accuracy") != (comparison.task == "classification"):
        raise ConfigError(f"metric: {comparison.metric} does not go with task {comparison.task}")
    if comparison.answers and comparison.task != "sft":
        raise ConfigError(f"answers: task {comparison.task} has none; leave the section out")
    if wrong := [key for key in comparison.training if key in _DECIDED or key.startswith("do_")]:
        raise ConfigError(
            f"training.{', training.'.join(wrong)}: a comparison logs every step, evaluates by steps, and tests single"
            " rows; leave it out"
        )
    if comparison.data.seed is None:
        raise ConfigError("data.seed: the held-out and test rows have to be the same for all seeds; give a number")
    check_task(Recipe(comparison.model, comparison.data, "", comparison.task, rwkv=comparison.rwkv))


def listed_methods(comparison: ComparisonConfig) -> list[ListedMethod]:
    """The methods of a comparison, each with its label, settings and rates.

    Raises:
        ConfigError: a method is unknown, two have the same label, or one has more learning rates to try than another.
    """
    common = _rates(comparison.learning_rates, "")
    listed = [_listed_method(line, f"methods[{number}]", common) for number, line in enumerate(comparison.methods)]
    labels = [entry.label for entry in listed]
    if double := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise ConfigError(f"methods: {', '.join(double)} is listed more than once; give each a label of its own")
    if not listed:
        raise ConfigError("methods: is empty; name one or more")
    if len({len(entry.learning_rates) for entry in listed}) > 1:
        counts = ", ".join(f"{entry.label} {len(entry.learning_rates)}" for entry in listed)
        raise ConfigError(f"learning_rates: every method may try as many as any other, but got {counts}")
    return listed


def _listed_method(line: str | dict[str, Any], where: str, common: tuple[float, ...]) -> ListedMethod:
    fields = {"method": line} if isinstance(line, str) else dict(line)
    name = fields.get("method")
    if name not in METHODS:
        raise ConfigError(f"{where}: got method {name!r}, wanted one of {', '.join(METHODS)}")
    settings = {key: value for key, value in fields.items() if key not in _ENTRY}
    rates = fields.get("learning_rates")
    if rates is None:  # rounded, so that 3e-3 times 0.1 is 3e-4
        rates = [float(f"{rate * METHODS[name].rate_factor:.6g}") for rate in common]
    label = " ".join([name, *(f"{key}={value}" for key, value in settings.items())])[:60]
    label = str(fields.get("label") or label)
    if not re.search(r"\w", label) or len(label) > 60:
        raise ConfigError(f"{where}: label {label!r}: wanted a word of at most 60 characters")
    return ListedMethod(label, name, settings, _rates(rates, f"{where}: "))


def _rates(rates: Any, where: str) -> tuple[float, ...]:
    values = rates if isinstance(rates, list) else [rates]
    good = [isinstance(r, int | float) and not isinstance(r, bool) and math.isfinite(r) and r > 0 for r in values]
    if not values or not all(good) or len(set(values)) != len(values):
        raise ConfigError(f"{where}learning_rates: got {rates!r}, wanted different positive numbers")
    return tuple(sorted(map(float, values)))
