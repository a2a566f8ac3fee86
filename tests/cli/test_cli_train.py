"""`flashbone train` as a user runs it: files out, table or JSON on stdout, everything else on stderr."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashbone import cli
from flashbone.cli.configured import separate
from flashbone.cli.train import OPTIONS
from flashbone.train.recipe import load_recipe
from helpers.tiny_llama import questions, write_tiny_llama

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model, data and a configuration."""
    folder = tmp_path_factory.mktemp("work")
    write_tiny_llama(folder / "llama")
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(40)))
    (folder / "c.yaml").write_text(
        "model: llama\ndata: {path: q.jsonl}\nadapter: {r: 8}\noutput: runs/a\n"
        "training: {max_steps: 4, learning_rate: 5e-3}\n"
    )
    return folder


def run_command(folder, *args):
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "COLUMNS": "100"}
    command = [sys.executable, "-m", "flashbone", "train", *args]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)


@pytest.mark.slow
def test_a_run_prints_its_table_draws_its_losses_and_can_be_resumed(workplace):
    done = run_command(workplace, "c.yaml", "--output", "runs/table", "--adapter.variant", "bat-col")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert "flashbone: data: 36 training rows, 4 held out" in done.stderr
    for line in ("sft with bat-col, block size 8", "trainable parameters", "held-out loss, before -> after", "MiB"):
        assert line in done.stdout
    out = workplace / "runs/table"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(Path("runs/table/adapter")) in done.stdout

    again = run_command(
        workplace, "c.yaml", "--output", "runs/table", "--adapter.variant", "bat-col", "--resume", "--json"
    )
    assert again.returncode == 0
    assert "the run in runs/table is finished; nothing to do" in again.stderr
    assert json.loads(again.stdout) == json.loads((out / "summary.json").read_text())


def test_a_misspelt_field_is_one_line_and_code_one(workplace, capsys, monkeypatch):
    monkeypatch.chdir(workplace)
    assert cli.main(["train", "c.yaml", "--training.max_stps", "3"]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "flashbone train: error: c.yaml: unknown field: training.max_stps "
        "(did you mean training.max_steps or training.save_steps?)\n"
    )
    assert not captured.out


def test_a_missing_configuration_is_a_usage_error_and_help_is_none(capsys):
    assert cli.main(["train"]) == 2
    assert "CONFIG.yaml" in capsys.readouterr().err
    assert cli.main(["train", "--help"]) == 0
    assert "--resume" in capsys.readouterr().out


def test_fields_may_stand_before_or_after_the_configuration():
    ours, fields = separate(["--adapter.r", "16", "c.yaml", "--resume", "--output=x", "--data.eval", "-1"], OPTIONS)
    assert ours == ["c.yaml", "--resume"]
    assert fields == ["--adapter.r", "16", "--output=x", "--data.eval", "-1"]


@pytest.mark.parametrize(("script", "variant"), [("run_bone.sh", "bone"), ("run_bat.sh", "bat-col")])
def test_the_example_scripts_are_the_recipe_of_the_paper(script, variant, tmp_path):
    """The script runs with a stub in place of `flashbone` that writes down its arguments, which are then parsed."""
    stub = tmp_path / "flashbone"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$ARGUMENTS"\n')
    stub.chmod(0o755)
    written = tmp_path / "arguments"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "ARGUMENTS": str(written)}
    subprocess.run(["bash", str(EXAMPLES / script)], check=True, cwd=tmp_path, env=environment, timeout=30)
    command, *args = written.read_text().splitlines()
    ours, fields = separate(args, OPTIONS)
    assert command == "train"
    recipe = load_recipe(ours[0], fields)

    assert recipe.data.path == "meta-math/MetaMathQA"
    assert recipe.data.split == "train[:100000]"
    assert recipe.data.format == "alpaca"
    assert recipe.data.columns == {"instruction": "query", "output": "response"}
    assert recipe.adapter["r"] == 64
    assert recipe.adapter["variant"] == variant
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert set(recipe.adapter["target_modules"]) == projections
    training = recipe.training
    assert (training["learning_rate"], training["lr_scheduler_type"], training["warmup_steps"]) == (2e-5, "cosine", 0)
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 64
    assert (training["num_train_epochs"], training["bf16"]) == (1, True)


def test_the_example_configuration_is_valid():
    recipe = load_recipe(EXAMPLES / "train_sft.yaml")
    assert recipe.task == "sft"
    assert recipe.merge is True
