"""`flashbone train` under accelerate's launcher, in two processes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import launch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from flashbone import cli
from flashbone.errors import ConfigError
from flashbone.train.arguments import check_launch, trainer_arguments
from flashbone.train.recipe import DataRecipe, Recipe
from flashbone.train.run import train
from helpers.tiny_llama import questions, write_tiny_llama

HERE = Path(__file__).parent


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a model, data and a configuration."""
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "llama")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(40)))
    (tmp_path / "c.yaml").write_text(
        "model: llama\ndata: {path: q.jsonl}\nadapter: {r: 8, variant: bat-col}\noutput: runs/a\n"
        "training: {max_steps: 6, learning_rate: 5e-3, per_device_train_batch_size: 4, use_cpu: true}\n"
    )
    return tmp_path


def command(*args, start=subprocess.run, **more):
    """`flashbone train` in a process of its own."""
    return start(
        [sys.executable, "-m", "flashbone", "train", *args],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **({"check": True, "timeout": 240} if start is subprocess.run else {}) | more,
    )


def processes_with(word):
    """Running processes that have this word in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and word in (entry / "cmdline").read_bytes().decode(errors="replace").split("\0"):
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_ends_all_processes_and_a_failure_is_one_line_and_its_code(workplace):
    """Where none says what is wrong but the first: the second only finds that it is alone."""
    output = str(workplace / "runs/long")
    args = ("c.yaml", "--output", output, "--processes", "2", "--training.max_steps", "100000")
    more = ("--training.logging_steps", "1", "--samples", "0", "--training.disable_tqdm", "true")
    running = command(*args, *more, start=subprocess.Popen, start_new_session=True)
    until = time.monotonic() + 200
    while not (metrics := Path(output, "metrics.jsonl")).exists() or metrics.read_text().count('"loss"') < 2:
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.2)
    assert len(processes_with(output)) == 3
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "flashbone train: interrupted" in said
    assert "Traceback" not in said
    assert processes_with(output) == []

    again = command(*args, check=False)
    assert again.returncode == 1
    errors = [line for line in again.stderr.splitlines() if "error" in line]
    held = f"output {output} already holds a run; continue it with --resume, or choose another output"
    assert errors == [f"flashbone train: error: {held}"]


@pytest.mark.parametrize(
    ("number", "message"),
    [("0", "got 0, wanted 1 or more"), ("4097", r"got 4097, but there are \d+ (CPU cores|GPUs)")],
)
def test_a_wrong_number_of_processes_is_one_line(workplace, capsys, number, message):
    assert cli.main(["train", "c.yaml", f"--processes={number}"]) == 1
    assert re.fullmatch(f"flashbone train: error: --processes: {message}.*\n", capsys.readouterr().err)


def test_processes_are_not_launched_by_launched_ones(workplace, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "c.yaml", "--processes", "2"]) == 1
    assert "a launcher has started this process already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_under_fsdp2_learns_and_leaves_a_whole_adapter(workplace):
    launch("fsdp2", str(HERE / "pretend.py"), "train", "c.yaml")
    summary = json.loads((workplace / "runs/a/summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.1
    assert summary["samples"] == [], "the model is sharded"
    assert summary["tokens"] == 6 * 2 * 4 * 14  # steps, processes, rows, tokens in a row
    base = AutoModelForCausalLM.from_pretrained("llama")
    model = PeftModel.from_pretrained(base, workplace / "runs/a/adapter")
    blocks = [p for name, p in model.named_parameters() if "bone_" in name]
    assert min(block.abs().max() for block in blocks) > 1e-3  # each has learned
    assert sum(block.numel() for block in blocks) == summary["trainable_parameters"]


def test_processes_that_would_each_train_alone_are_refused(workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were launched, .* training\.use_cpu"):
        train(Recipe("llama", DataRecipe("q.jsonl"), "runs/b", training={"max_steps": 1, "disable_tqdm": True}))
    assert not (workplace / "runs/b").exists()


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_a_merge_under_an_engine_that_the_launcher_chose_is_refused(workplace, monkeypatch, engine):
    training = {"max_steps": 1, "use_cpu": True}
    recipe = Recipe("llama", DataRecipe("q.jsonl"), "runs/b", merge=True, training=training)
    arguments = trainer_arguments(recipe)
    check_launch(recipe, arguments)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match="merge: true needs the whole model in one process"):
        check_launch(recipe, arguments)


@pytest.mark.slow
def test_a_launched_run_that_would_merge_ends_before_it_trains(workplace):
    with pytest.raises(AssertionError, match="flashbone train: error: merge: true needs the whole model"):
        launch("fsdp2", str(HERE / "pretend.py"), "train", "c.yaml", "--merge", "true")
    assert not (workplace / "runs/a").exists()


def test_accumulation_that_is_not_the_launchers_is_refused(workplace, monkeypatch):
    training = {"max_steps": 1, "use_cpu": True, "gradient_accumulation_steps": 4}
    recipe = Recipe("llama", DataRecipe("q.jsonl"), "runs/b", training=training)
    arguments = trainer_arguments(recipe)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    check_launch(recipe, arguments)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    with pytest.raises(ConfigError, match=r"accumulation_steps: got 4, but accelerate's file says 1 to DeepSpeed"):
        check_launch(recipe, arguments)


@pytest.mark.slow
def test_a_process_that_is_done_leaves_its_group(tmp_path):
    code = """
import sys, torch.distributed as dist
from flashbone.cli.train import leave_processes
leave_processes()  # of no group
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
leave_processes()
assert not dist.is_initialized()
print("left")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "meeting")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


@pytest.mark.slow
def test_two_processes_of_ddp_train_one_model(workplace):
    """With a loss before training, too: what accelerate prepared for that, it would not wrap in DDP again."""
    more = ["--training.logging_steps", "1", "--training.max_steps", "4"]
    command("c.yaml", *more, "--processes", "2")
    alone = [*more, "--output", "runs/one", "--training.per_device_train_batch_size", "8"]
    command("c.yaml", *alone)
    two, one = (
        [json.loads(line) for line in (workplace / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("a", "one")
    )
    for key in ("loss", "grad_norm", "eval_loss"):
        got, want = ([row[key] for row in rows if key in row] for rows in (two, one))
        assert len(got) >= 4
        assert got == pytest.approx(want, rel=1e-3), key
    shown, want = (
        json.loads((workplace / "runs" / name / "summary.json").read_text())["samples"] for name in ("a", "one")
    )
    assert len(shown) == 3
    assert [sample["before"] for sample in shown] == [sample["before"] for sample in want]
