"""The runs of a comparison: everything that decides each, and so the name of its folder."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flashbone.compare.config import ComparisonConfig, ListedMethod
from flashbone.compare.methods import METHODS
from flashbone.compare.results import RunRow
from flashbone.files.sources import sha256
from flashbone.train.recipe import DataRecipe, Recipe

# Defaults of a comparison; everything else is as in `flashbone train`.
DEFAULTS = {"eval_steps": 0.2, "save_strategy": "no"}
# Every loss is a point of a curve, and the first gradient's norm is a figure of its own.
FIXED = {"eval_strategy": "steps", "logging_strategy": "steps", "logging_steps": 1, "logging_first_step": True}


@dataclass(frozen=True)
class RunSpec:
    """One run: a method at one learning rate with one seed. All that decides its numbers is in it.

    Attributes:
        label: of the method in the comparison.
        method: of `METHODS`.
        size: fields that give the method its size.
        settings: the user's own fields.
        target_modules: what adapters are put on, unless the settings say otherwise.
        learning_rate: of the run.
        seed: of the adapter's start and of the order of the rows.
        data: where the rows are, and how many are held out and tested.
        recipe: model, task, training, and what else a recipe has.
        metric: loss, accuracy or exact_match.
        answers: see `Answers`.
        contents: hashes of the local files of `data`, so that changed files make new runs.
    """

    label: str
    method: str
    size: dict[str, Any]
    settings: dict[str, Any]
    target_modules: str | list[str]
    learning_rate: float
    seed: int
    data: dict[str, Any]
    recipe: dict[str, Any]
    metric: str
    answers: dict[str, Any]
    contents: dict[str, str]

    @property
    def name(self) -> str:
        """Of its folder, with a hash of everything that decides the run; the label does not."""
        plain = json.dumps({**dataclasses.asdict(self), "label": None}, sort_keys=True)
        key = hashlib.sha256(plain.encode()).hexdigest()[:10]
        return f"{self.method}-{self.learning_rate:g}-seed{self.seed}-{key}"

    def row(self, status: Literal["ok", "failed"], **figures: Any) -> RunRow:
        """The row of results that this run comes to."""
        return RunRow(self.label, self.seed, False, status, self.learning_rate, **figures)

    def to_recipe(self, folder: Path) -> Recipe:
        """What is trained, as `flashbone train` takes it; the adapter aside."""
        plain = {name: value for name, value in self.data.items() if name != "test"}
        training = {**DEFAULTS, **self.recipe["training"], **FIXED, "learning_rate": self.learning_rate}
        if "save_steps" in training and "save_strategy" not in self.recipe["training"]:
            training["save_strategy"] = "steps"
        if METHODS[self.method].is_bound:  # only adapters resume
            training["save_strategy"] = "no"
        if self.recipe["task"] == "sft":
            training["eval_packing"] = False  # the test is scored row by row
        fields = {**self.recipe, "training": training}
        return Recipe(data=DataRecipe(**plain), output=str(folder), seed=self.seed, monitor=False, **fields)


def run_spec(
    comparison: ComparisonConfig, listed: ListedMethod, size: Mapping[str, Any], learning_rate: float, seed: int
) -> RunSpec:
    """The run of a method at a learning rate with a seed."""
    data = dataclasses.asdict(comparison.data)
    fields = ("model", "task", "training", "quantization", "rwkv")
    return RunSpec(
        label=listed.label,
        method=listed.method,
        size=dict(size),
        settings=listed.settings,
        target_modules=comparison.target_modules,
        learning_rate=learning_rate,
        seed=seed,
        data=data,
        recipe={name: getattr(comparison, name) for name in fields},
        metric=comparison.test_metric,
        answers=comparison.answers,
        contents={path: _content(path) for path in _files(data)},
    )


def _files(data: Mapping[str, Any]) -> list[str]:
    """The local files that `data` names."""
    test = data["test"]
    named = [part["path"] if isinstance(part, Mapping) else part for part in (data["path"], data["eval"], test)]
    places = [Path(name).expanduser() for name in named if isinstance(name, str)]
    pairs = [place.with_suffix(kind) for place in places if place.name for kind in (".bin", ".idx")]
    return [str(place) for place in dict.fromkeys([*places, *pairs]) if place.is_file()]


def forget_contents() -> None:
    """Read the files anew: a comparison reads each once, when it starts, and what changes later is for the next."""
    _content.cache_clear()


@functools.cache
def _content(path: str) -> str:
    return sha256(Path(path))[:16]
