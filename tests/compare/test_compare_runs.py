"""A comparison that ran whole: fair, complete, repeatable, and resumed after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from compared import lines, of, results

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from flashbone.compare.commands import Origin
from flashbone.compare.config import load_comparison
from flashbone.compare.run import compare
compare(load_comparison(sys.argv[1], sys.argv[2:]), Origin(sys.argv[1], tuple(sys.argv[2:])))
"""

# A run as another version of flashbone would describe it.
MISFIT = """
import dataclasses, pathlib
from flashbone.compare.ray_tasks import run_tasks
from flashbone.errors import ConfigError
run = dataclasses.make_dataclass("Run", ["recipe", "newer"])({"training": {"use_cpu": True}}, 1)
try:
    list(run_tasks([run], pathlib.Path("runs")))
except ConfigError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def whole(llama, rows, tmp_path_factory):
    """A comparison with five methods, one of which cannot work, and its configuration."""
    import yaml

    folder = tmp_path_factory.mktemp("whole")
    config = folder / "config.yaml"
    fields = {
        "model": str(llama),
        "data": {"path": str(rows / "train.jsonl"), "eval": 16, "test": str(rows / "test.jsonl")},
        "methods": ["bone", "lora", "miss", "linear", {"method": "oft", "oft_block_size": 7}],
        "budget": {"method": "bone", "r": 8},
        "learning_rates": [1e-3, 1e-2],
        "seeds": [0, 1],
        "training": {"max_steps": 4, "per_device_train_batch_size": 4, "eval_steps": 2, "use_cpu": True},
        "output": str(folder / "out"),
    }
    config.write_text(yaml.safe_dump(fields))
    return config, results(config)


def test_every_method_learns_the_same_rows_and_tokens_in_the_same_order(whole):
    runs = of(whole[1], "run")
    for seed in (0, 1):
        same = [(run["digest"], run["tokens"], run["steps"]) for run in runs if run["seed"] == seed]
        assert len(same) == {0: 8, 1: 4}[seed]
        assert len(set(same)) == 1
    assert len({run["digest"] for run in runs}) == 2  # another seed is another order
    assert whole[1][0]["fairness"]["problems"] == []


def test_losses_of_single_held_out_rows_make_up_the_curve_and_are_kept_where_they_are_used(whole):
    for run in of(whole[1], "run"):
        curve = run["held_out"]
        assert (curve["rows"] is not None) == run["counted"]
        for loss, rows in zip(curve["loss"], curve["rows"] or (), strict=run["counted"]):
            assert loss == pytest.approx(sum(rows) / sum(curve["weights"]), rel=1e-4)
        assert curve["step"] == [0, 2, 4]


def test_sizes_of_matched_methods_are_within_three_percent(whole, llama):
    methods = {row["method"]: row for row in of(whole[1], "method")}
    sizes = [row["adapter_parameters"] for row in methods.values() if row["matched"]]
    assert len(sizes) == 3
    assert max(sizes) <= 1.03 * min(sizes)
    assert methods["linear"]["bound"]
    model = json.loads((llama / "config.json").read_text())
    assert methods["linear"]["trainable_parameters"] == model["hidden_size"] * model["vocab_size"]


def test_a_method_that_fails_is_a_row_with_its_error(whole):
    failed = next(row for row in whole[1] if row.get("method", "").startswith("oft"))
    assert failed["status"] == "failed"
    assert "oft" in failed["error"]
    assert "choose one that divides the inputs of all layers" in failed["error"]
    assert whole[1][0]["finished"]


def test_curves_and_figures_are_all_there(whole):
    for run in (row for row in whole[1] if row["kind"] == "run"):
        assert run["train"]["step"] == [1, 2, 3, 4]
        assert run["held_out"]["step"] == [0, 2, 4]
        assert run["train"]["seconds"] == sorted(run["train"]["seconds"])
        assert run["held_out"]["seconds"][0] == run["startup_s"]
        assert run["held_out"]["seconds"][-1] == pytest.approx(run["startup_s"] + run["train_s"], abs=2e-3)
        assert len(run["test_scores"]) == len(run["test_weights"]) == 24
        assert run["test"]["loss"] == pytest.approx(sum(run["test_scores"]) / sum(run["test_weights"]), rel=1e-4)
        assert run["step_ms"] > 0
        assert run["grad_norm_first"] > 0
        assert run["adapter_bytes"] > 0
        assert 0 < run["above_model_mib"] < run["peak_mib"]


def test_the_rate_is_chosen_by_the_held_out_rows_and_the_others_follow_at_it(whole):
    runs = of(whole[1], "run")
    for method in of(whole[1], "method")[:4]:
        tried = {
            run["learning_rate"]: run["held_out"]["loss"][-1]
            for run in runs
            if run["method"] == method["method"] and run["seed"] == 0
        }
        assert len(tried) == 2
        assert method["chosen"] == min(tried, key=tried.__getitem__)
        counted = [run for run in runs if run["method"] == method["method"] and run["counted"]]
        assert {run["learning_rate"] for run in counted} == {method["chosen"]}
        assert {run["seed"] for run in counted} == {0, 1}


def test_the_test_rows_decide_nothing_but_the_test(whole, config, rows):
    other = results(config(data={"path": str(rows / "train.jsonl"), "eval": 16, "test": str(rows / "other.jsonl")}))
    before = [run for run in of(whole[1], "run") if run["method"] in ("bone", "lora")]
    after = of(other, "run")
    assert len(before) == len(after) == 6
    for one, two in zip(before, after, strict=True):
        assert one["test_scores"] != two["test_scores"]
        for name in ("learning_rate", "counted", "digest", "train", "held_out"):
            assert one[name] == two[name]


def test_a_comparison_run_again_elsewhere_gives_the_same_numbers(whole, tmp_path):
    jobs = "2" if torch.get_num_threads() == 1 else "1"  # two at once share the threads, and fewer may round otherwise
    again = results(whole[0], "--output", str(tmp_path / "again"), "--methods", "[bone, linear]", "--jobs", jobs)
    before = [run for run in of(whole[1], "run") if run["method"] in ("bone", "linear")]
    assert of(again, "run") == before


def test_the_command_in_a_row_reruns_it_to_the_same_numbers(whole, tmp_path):
    import shlex

    row = next(row for row in whole[1] if row["kind"] == "method" and row["method"] == "lora")
    program, command, *args = shlex.split(row["rerun"])
    assert (program, command) == ("flashbone", "compare")
    again = results(Path(args[0]), *args[1:], "--output", str(tmp_path / "again"))
    before = [run for run in of(whole[1], "run") if run["method"] == "lora" and run["counted"]]
    assert of(again, "run") == before


def test_the_recipe_for_the_winner_trains_to_the_same_loss(whole, tmp_path):
    from flashbone.train.recipe import load_recipe
    from flashbone.train.run import train

    row = next(row for row in whole[1] if row["kind"] == "method" and row["method"] == "bone")
    assert row["train"].startswith("flashbone train ")
    recipe = load_recipe(row["train"].split()[-1], ["--output", str(tmp_path / "trained")])
    run = next(run for run in whole[1] if run["kind"] == "run" and run["method"] == "bone" and run["counted"])
    assert train(recipe).summary["eval_loss_after"] == pytest.approx(run["held_out"]["loss"][-1], rel=1e-4)


def test_what_has_been_run_is_not_run_again(whole):
    folder = whole[0].parent / "out" / "runs"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = results(whole[0])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert again == [{**row, **({"date": again[0]["date"]} if row["kind"] == "comparison" else {})} for row in whole[1]]


@pytest.mark.parametrize(("after", "jobs"), [(1, "1"), (3, "1"), (1, "ray")])
def test_a_comparison_that_was_killed_goes_on_to_the_same_numbers(whole, tmp_path, after, jobs):
    """kill -9 of the program while the run after the first, or the third, is under way."""
    if jobs == "ray" and find_spec("ray") is None:  # its import sets variables
        pytest.skip("ray is not installed here; `make test-ray` brings it")
    out = tmp_path / "killed"
    args = [str(whole[0]), "--output", str(out), "--methods", "[bone, lora]", "--jobs", jobs]
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, *args])
    wait_for(lambda: len(list(out.glob("runs/*/result.json"))) >= after and unfinished(out))
    running = [job_process(folder) for folder in unfinished(out)]
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    wait_for(lambda: not any(map(alive, running)))
    done = {path: path.read_bytes() for path in out.glob("runs/*/result.json")}
    subprocess.run([sys.executable, "-c", PROGRAM, *args], check=True)
    again = lines(out / "results.jsonl")
    assert {path: path.read_bytes() for path in done} == done
    assert of(again, "run") == [run for run in of(whole[1], "run") if run["method"] in ("bone", "lora")]


def test_a_task_that_ray_cannot_start_is_told_in_one_line():
    if find_spec("ray") is None:
        pytest.skip("ray is not installed here; `make test-ray` brings it")
    done = subprocess.run([sys.executable, "-c", MISFIT], capture_output=True, text=True, check=True)
    assert re.fullmatch(
        r"jobs: ray: .*unexpected keyword argument 'newer'; every machine needs .* folder .*\n", done.stdout
    )


def unfinished(out: Path) -> list[Path]:
    return [
        folder
        for folder in out.glob("runs/*")
        if (folder / "log.txt").exists() and not (folder / "result.json").exists()
    ]


def job_process(folder: Path) -> int | None:
    """The process that has the run's log open."""
    for place in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if os.readlink(place) == str(folder / "log.txt"):
                return int(place.parts[2])
        except OSError:
            continue
    return None


def alive(pid: int | None) -> bool:
    return pid is not None and Path(f"/proc/{pid}").exists()


def wait_for(condition, seconds: float = 250) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.01)
