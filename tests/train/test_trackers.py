"""`training.report_to`: what trackers leave on disk, read back; and one that is not there."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from training_runs import metrics_of, recipe_for

from flashbone.errors import ConfigError
from flashbone.train.arguments import trainer_arguments
from flashbone.train.data.origins import DataRecipe
from flashbone.train.recipe import Recipe


def of_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "run" / "tensorboard"))
    read.Reload()
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in ("train/loss", "eval/loss")}


def of_trackio(folder):
    [file] = folder.glob("tracked/*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    names = ("train/loss", "eval/loss")
    return {name: [(row["train/global_step"], row[name]) for row in rows if name in row] for name in names}


@pytest.mark.beside
@pytest.mark.parametrize(("tracker", "read"), [("tensorboard", of_tensorboard), ("trackio", of_trackio)])
def test_a_tracker_has_the_losses_of_the_run(tracker, read, llama, questions_file, tmp_path):
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    recipe = recipe_for(llama, questions_file, tmp_path / "run", training={"max_steps": 4, "logging_steps": 1})
    flags = ["--model", recipe.model, "--data.path", recipe.data.path, "--output", recipe.output, "--samples", "0"]
    flags += ["--training.max_steps", "4", "--training.logging_steps", "1", "--training.report_to", tracker]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "tracked")}
    command = [sys.executable, "-m", "flashbone", "train", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    for name, values in read(tmp_path).items():
        key = name.replace("train/", "").replace("/", "_")
        assert values == [
            (row["step"], pytest.approx(row[key], rel=1e-6)) for row in metrics_of(recipe.output) if key in row
        ]
        assert len(values) >= 4
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_loaded(tracker):
    if importlib.util.find_spec(tracker) is not None:
        pytest.skip(f"{tracker} is installed")
    with pytest.raises(ConfigError, match=rf"training\.report_to: {tracker} is not installed; .*install"):
        trainer_arguments(Recipe("no/model", DataRecipe("no.jsonl"), "out", training={"report_to": [tracker]}))
