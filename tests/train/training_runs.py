"""Recipes for small runs, runs that are killed, and what they logged."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from flashbone import cli
from flashbone.train import fitting
from flashbone.train.folder import RunFolder
from flashbone.train.recipe import DataRecipe, Recipe
from flashbone.train.run import train
from helpers.forks import run_in_fork

TIMINGS = ("train_s",)


def recipe_for(llama, file, output, **changes) -> Recipe:
    training = {"max_steps": 10, "learning_rate": 5e-3, "per_device_train_batch_size": 8, "disable_tqdm": True}
    fields = {
        "model": str(llama),
        "data": DataRecipe(path=str(file)),
        "output": str(output),
        "adapter": {"r": 8},
        "training": {**training, **changes.pop("training", {})},
        "samples": 0,  # answers take as long as all else of a small run
    }
    return Recipe(**{**fields, **changes})


def metrics_of(folder) -> list[dict]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def config_file(recipe: Recipe, path: Path) -> Path:
    path.write_text(json.dumps(dataclasses.asdict(recipe)))  # JSON is YAML
    return path


class Stopped(Exception):
    """A run that is cut off."""


def stop_at(step: int, recipe: Recipe, monkeypatch) -> None:
    """Train until the end of a step, which is not recorded."""

    def stops(self, args, state, control, _step_end=fitting.Recorder.on_step_end, **kwargs):
        if state.global_step == step:
            raise Stopped
        _step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Recorder, "on_step_end", stops)
        with pytest.raises(Stopped):
            train(recipe)


def kill_at_step_seven(recipe: Recipe, folder: Path) -> None:
    """`flashbone train` of the recipe in a process that is gone at its seventh step."""
    said = folder / "killed.txt"

    def run() -> None:
        step_end = fitting.Recorder.on_step_end

        def dies(self, args, state, control, **kwargs):
            if state.global_step == 7:
                os._exit(9)
            step_end(self, args, state, control, **kwargs)

        fitting.Recorder.on_step_end = dies
        cli.main(["train", str(config_file(recipe, folder / "killed.yaml"))])

    assert run_in_fork(run, said) == 9, said.read_text()
    assert RunFolder(recipe.output).last_checkpoint().name == "checkpoint-6"


def flip(file: Path) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
