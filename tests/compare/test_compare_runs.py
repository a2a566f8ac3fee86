"""Whole comparisons on a tiny Llama: fair, repeatable, resumable after a kill, honest about failures."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashbone.compare.commands import Origin
from flashbone.compare.config import load_comparison
from flashbone.compare.run import Experiment, alone, compare

TIMES = {"step_ms", "train_s", "startup_s", "load_s", "peak_mib", "above_model_mib", "seconds"}
PROGRAM = """
import sys
from flashbone.compare.commands import Origin
from flashbone.compare.config import load_comparison
from flashbone.compare.run import compare
compare(load_comparison(sys.argv[1], sys.argv[2:]), Origin(sys.argv[1], tuple(sys.argv[2:])))
"""


def results(config: Path, *overrides: str) -> list[dict]:
    """The lines that the comparison comes to."""
    return lines(compare(load_comparison(config, list(overrides)), Origin(str(config), overrides)))


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def untimed(value):
    """Without what no two runs have in common."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if key not in TIMES}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def of(rows: list[dict], kind: str) -> list[dict]:
    return untimed([row for row in rows if row["kind"] == kind])


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
    assert "does not divide" in failed["error"]
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
    again = results(whole[0], "--output", str(tmp_path / "again"), "--methods", "[bone, linear]", "--jobs", "2")
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
    assert train(recipe).summary["eval_loss_after"] == pytest.approx(run["held_out"]["loss"][-1], rel=1e-6)


def test_what_has_been_run_is_not_run_again(whole):
    folder = whole[0].parent / "out" / "runs"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = results(whole[0])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert again == [{**row, **({"date": again[0]["date"]} if row["kind"] == "comparison" else {})} for row in whole[1]]


@pytest.mark.parametrize("after", [1, 3])
def test_a_comparison_that_was_killed_goes_on_to_the_same_numbers(whole, tmp_path, after):
    """kill -9 of the program while the run after the first, or the third, is under way."""
    out = tmp_path / "killed"
    args = [str(whole[0]), "--output", str(out), "--methods", "[bone, lora]"]
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, *args])
    wait_for(lambda: len(list(out.glob("runs/*/result.json"))) >= after and unfinished(out))
    running = [job_process(folder) for folder in unfinished(out)]
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    wait_for(lambda: not any(map(alive, running)))
    done = {path: path.read_bytes() for path in out.glob("runs/*/result.json")}
    again = results(whole[0], *args[1:])
    assert {path: path.read_bytes() for path in done} == done
    assert of(again, "run") == [run for run in of(whole[1], "run") if run["method"] in ("bone", "lora")]


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


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.01)


def test_a_run_that_is_killed_alone_is_a_failed_row_and_is_done_again(config, monkeypatch):
    path = config(methods=["bone"], seeds=[0], learning_rates=[1e-3])
    with monkeypatch.context() as patch:
        patch.setattr("flashbone.compare.processes._start", started_and_killed)
        rows = results(path)
    assert [row["status"] for row in rows[1:]] == ["failed", "failed"]
    assert "its process ended by signal 9 (out of memory?); see " in rows[1]["error"]
    assert [row["status"] for row in results(path)[1:]] == ["ok", "ok"]


def started_and_killed(context, job, folder, place):
    process = context.Process(target=time.sleep, args=(60,))
    process.start()
    process.kill()
    return process


def test_a_rate_that_diverges_is_passed_over(config):
    rows = results(config(methods=["bone"], seeds=[0], learning_rates=[1e-3, 1e18]))
    method, good, bad = rows[1:]
    assert (method["status"], method["chosen"]) == ("ok", 1e-3)
    assert (good["status"], bad["status"]) == ("ok", "failed")
    assert "lower training.learning_rate" in bad["error"]


def test_failures_are_kept_until_they_are_to_be_tried_again(config, tmp_path):
    """Both rates failed before, as when the disk was full: tried again, the better of both is chosen."""
    path = config(methods=["bone"])
    want = of(results(path), "method")
    for file in (tmp_path / "out").glob("runs/*/result.json"):
        file.write_text(json.dumps({"status": "failed", "error": "the disk was full"}))
    again = results(path)
    assert (again[1]["status"], again[1]["error"], again[1]["chosen"]) == ("failed", "the disk was full", None)
    compare(load_comparison(path), Origin(str(path)), retry_failed=True)
    assert of(lines(tmp_path / "out" / "results.jsonl"), "method") == want


def test_a_run_with_checkpoints_goes_on_from_the_last_one_to_the_same_numbers(config, tmp_path):
    fields = {"methods": ["bone"], "seeds": [0], "learning_rates": [1e-3]}
    training = {"max_steps": 6, "per_device_train_batch_size": 4, "eval_steps": 2, "use_cpu": True, "save_steps": 2}
    path = config(**fields, training=training)
    first = results(path)
    folder = next((tmp_path / "out" / "runs").glob("*"))
    assert not list(folder.glob("checkpoint-*"))  # nothing goes on from them any more
    (folder / "result.json").unlink()
    experiment = Experiment(load_comparison(path), Origin(str(path)))
    kill_during_step_five(experiment.sweep()[0], folder)
    second = results(path)
    assert untimed(second) == untimed(first)
    assert "going on from" in (folder / "log.txt").read_text()


def test_changed_rows_make_new_runs(config, rows, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text((rows / "train.jsonl").read_text())
    data = {"path": str(file), "eval": 16, "test": str(rows / "test.jsonl")}
    path = config(methods=["bone"], seeds=[0], learning_rates=[1e-3], data=data)
    before = of(results(path), "run")
    assert of(results(path), "run") == before
    file.write_text("".join(file.read_text().splitlines(keepends=True)[::-1]))
    assert of(results(path), "run")[0]["digest"] != before[0]["digest"]


def test_two_comparisons_in_one_folder_do_not_get_in_each_others_way(config, tmp_path):
    from flashbone.errors import ConfigError

    path = config(methods=["bone"], seeds=[0], learning_rates=[1e-3])
    experiment = Experiment(load_comparison(path), Origin(str(path)))
    experiment.folder.mkdir()
    with alone(experiment.folder), pytest.raises(ConfigError, match="another comparison is running there"):
        results(path)
    assert results(path)[1]["status"] == "ok"


def test_rows_are_tested_in_their_order_whatever_the_trainer_sorts(config):
    """Rows sorted by length are drawn by the random state, which methods use up in ways of their own."""
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 5, "use_cpu": True}
    fields = {"methods": ["linear"], "seeds": [0], "learning_rates": [1e-9]}
    plain = results(config(**fields, training=training))
    sorted_rows = results(config(**fields, training={**training, "train_sampling_strategy": "group_by_length"}))
    assert sorted_rows[2]["digest"] != plain[2]["digest"]
    assert sorted_rows[2]["test_weights"] == plain[2]["test_weights"]
    assert sorted_rows[2]["test_scores"] == pytest.approx(plain[2]["test_scores"], rel=1e-4)


def kill_during_step_five(job, folder: Path) -> None:
    """Run the job again in a process that ends without a word in its fifth step."""
    program = """
import dataclasses, json, os, sys
from pathlib import Path
from flashbone.compare import measuring, worker
plain, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
before = measuring.Watch.on_step_begin
def on_step_begin(self, args, state, control, **kwargs):
    if state.global_step == 4:
        os._exit(9)
    before(self, args, state, control, **kwargs)
measuring.Watch.on_step_begin = on_step_begin
worker.work(plain, folder, None)
"""
    plain = json.dumps(dataclasses.asdict(job))
    ended = subprocess.run([sys.executable, "-c", program, plain, str(folder)], check=False, capture_output=True)
    assert ended.returncode == 9
    assert (folder / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"path": "no/such.jsonl", "eval": 4, "test": 4}}, "no/such.jsonl"),
        ({"training": {"per_device_train_batch_size": 4, "optim": "newton"}}, "newton"),
        ({"training": {"per_device_train_batch_size": 4, "lr_scheduler_type": "circular"}}, "circular"),
    ],
)
def test_what_would_fail_in_every_run_is_told_before_the_first(config, tmp_path, changes, words):
    from flashbone.errors import ConfigError

    with pytest.raises(ConfigError, match=words):
        results(config(**changes))
    assert not (tmp_path / "out").exists()


def test_questions_without_room_for_an_answer_are_told_before_training(config, rows, tmp_path):
    data = {"path": str(rows / "train.jsonl"), "eval": 16, "test": str(rows / "test.jsonl")}
    fields = {"methods": ["bone"], "seeds": [0], "learning_rates": [1e-3], "metric": "exact_match", "data": data}
    found = results(config(**fields, answers={"max_new_tokens": 250}))
    assert "more than the model's 256 positions" in found[1]["error"]
    assert not list((tmp_path / "out").glob("runs/*/metrics.jsonl"))


def test_what_trains_is_in_fp32_on_a_base_in_half_precision(config, tmp_path):
    """Heads, too, and for every method: else the bounds would train with more precision than the adapters."""
    from safetensors.torch import load_file

    training = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": True}
    found = results(config(methods=["bone", "lora", "linear"], seeds=[0], learning_rates=[1e-3], training=training))
    assert [row["status"] for row in found[1:4]] == ["ok"] * 3
    for file in (tmp_path / "out").glob("runs/*/adapter/*.safetensors"):
        assert {str(tensor.dtype) for tensor in load_file(file).values()} == {"torch.float32"}
    head, head_run = (next(row for row in rows if row["method"] == "linear") for rows in (found[1:4], found[4:]))
    assert head_run["adapter_bytes"] == 4 * head["trainable_parameters"]


def test_entries_that_come_to_the_same_run_share_it(config, tmp_path):
    listed = ["bone", {"method": "bone", "label": "bone again"}, {"method": "bone", "label": "bone*"}]
    found = results(config(methods=listed, seeds=[0], learning_rates=[1e-3], jobs=2))
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    assert [row["status"] for row in found[1:]] == ["ok"] * 6
    assert found[4]["train"]["step"] == [1, 2, 3, 4]
    assert len({row["train"] for row in found[1:4]}) == 3  # a recipe for each


def test_packed_rows_are_learned_together_and_tested_one_by_one(config):
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "packing": True, "max_length": 64}
    found = results(config(methods=["linear"], seeds=[0], learning_rates=[1e-9], training=training))
    assert found[1]["error"] is None
    assert len(found[2]["test_scores"]) == 24


def test_a_file_that_changes_meanwhile_is_for_the_next_comparison(config, rows, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text((rows / "train.jsonl").read_text())
    data = {"path": str(file), "eval": 16, "test": str(rows / "test.jsonl")}
    path = config(methods=["bone"], seeds=[0], learning_rates=[1e-3], data=data)
    experiment = Experiment(load_comparison(path), Origin(str(path)))
    names = [job.name for job in experiment.sweep()]
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    assert [job.name for job in experiment.sweep()] == names
    assert [job.name for job in Experiment(load_comparison(path), Origin(str(path))).sweep()] != names
