"""Comparisons that fail in part, are killed or changed, or whose runs are shared."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compared import lines, of, results, untimed

from flashbone.compare.commands import Origin
from flashbone.compare.config import load_comparison
from flashbone.compare.run import Experiment, compare
from flashbone.errors import ConfigError
from flashbone.files.outputs import alone

pytestmark = pytest.mark.slow


def test_a_run_that_is_killed_alone_is_a_failed_row_and_is_done_again(config, monkeypatch):
    path = config(methods=["bone"], seeds=[0], learning_rates=[1e-3])
    with monkeypatch.context() as patch:
        patch.setattr("flashbone.compare.processes._start", started_and_killed)
        rows = results(path)
    assert [row["status"] for row in rows[1:]] == ["failed", "failed"]
    assert "its process ended by signal 9 (out of memory?); see " in rows[1]["error"]
    assert [row["status"] for row in results(path)[1:]] == ["ok", "ok"]


def started_and_killed(context, spec, folder, slot):
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
        row = json.loads(file.read_text())
        file.write_text(json.dumps({**row, "status": "failed", "error": "the disk was full"}))
    again = results(path)
    assert (again[1]["status"], again[1]["error"], again[1]["chosen"]) == ("failed", "the disk was full", None)
    compare(load_comparison(path), Origin(str(path)), retry_failed=True)
    assert of(lines(tmp_path / "out" / "results.jsonl"), "method") == want


@pytest.mark.slow
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
    path = config(methods=["bone"], seeds=[0], learning_rates=[1e-3])
    experiment = Experiment(load_comparison(path), Origin(str(path)))
    with alone(experiment.folder), pytest.raises(ConfigError, match="another run is writing to it"):
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


def kill_during_step_five(spec, folder: Path) -> None:
    """Do the run again in a process that ends without a word in its fifth step."""
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
    plain = json.dumps(dataclasses.asdict(spec))
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


def test_ray_is_asked_for_before_anything_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="jobs: ray needs the package ray: pip install ray"):
        results(config(jobs="ray"))
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
    names = [spec.name for spec in experiment.sweep()]
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    assert [spec.name for spec in experiment.sweep()] == names
    assert [spec.name for spec in Experiment(load_comparison(path), Origin(str(path))).sweep()] != names
