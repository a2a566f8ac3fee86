"""Checkpoints prove to be whole; of those that do not, the one before is taken; the best is kept."""

import json
import re
from pathlib import Path

import pytest
from training_runs import flip, kill_at_step_seven, metrics_of, recipe_for

from flashbone.errors import ConfigError
from flashbone.files.records import to_json
from flashbone.train import folder as run_folder
from flashbone.train.arguments import trainer_arguments
from flashbone.train.checkpoints import MANIFEST, checkpoints, problem, write_manifest
from flashbone.train.folder import RunFolder
from flashbone.train.recipe import DataRecipe
from flashbone.train.run import train
from helpers.tiny_llama import questions

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]


FILES = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "rng_state_1.pth",
    "trainer_state.json",
)


def write_checkpoint(folder: Path, step: int = 5) -> Path:
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    for name in FILES:
        (place / name).write_bytes(f"{name} of {step}".encode() * 9)
    write_manifest(place)
    return place


DAMAGE = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-3]), "{} has .* bytes, .* were written"),
    "emptied": (lambda file: file.write_bytes(b""), "{} has 0 bytes, .* were written"),
    "missing": (Path.unlink, "{} is missing"),
    "flipped": (flip, "{} is damaged"),
    "grown": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "{} has .* bytes, .* were written"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_each_damage_of_each_file_of_a_checkpoint_is_named(tmp_path, kind, name):
    place = write_checkpoint(tmp_path)
    assert problem(place) is None
    damage, message = DAMAGE[kind]
    damage(place / name)
    assert re.fullmatch(message.format(re.escape(name)), str(problem(place)))


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "{}", '{"sizes": {}, "sha256": {}}', '{"sizes": {"trainer_state.json": "9"}}']
)
def test_a_broken_manifest_makes_a_broken_checkpoint(tmp_path, content):
    place = write_checkpoint(tmp_path)
    (place / MANIFEST).write_text(content)
    assert MANIFEST in str(problem(place))


def test_a_checkpoint_without_its_manifest_was_not_written_to_its_end(tmp_path):
    place = write_checkpoint(tmp_path)
    (place / MANIFEST).unlink()
    assert problem(place) == "was not written to its end"


def test_the_newest_whole_checkpoint_is_taken_and_the_broken_ones_are_named(tmp_path, caplog):
    recipe = recipe_for("m", "q", tmp_path)
    for step in (9, 10, 100):
        write_checkpoint(tmp_path, step)
    assert [place.name for place in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    flip(tmp_path / "checkpoint-100/optimizer.pt")
    (tmp_path / "checkpoint-10" / MANIFEST).unlink()
    run_folder.claim(recipe, resume=True)
    assert f"{tmp_path / 'checkpoint-100'} is not used: optimizer.pt is damaged" in caplog.text
    assert f"{tmp_path / 'checkpoint-10'} is not used: was not written to its end" in caplog.text
    assert RunFolder(tmp_path).last_checkpoint() == tmp_path / "checkpoint-9"
    flip(tmp_path / "checkpoint-9/scheduler.pt")
    with pytest.raises(ConfigError, match=r"is whole \(checkpoint-100: .*; checkpoint-9: .*\); delete the folder"):
        run_folder.claim(recipe, resume=True)
    assert len(checkpoints(tmp_path)) == 3


def test_checkpoints_without_an_optimiser_are_no_place_to_go_on(tmp_path):
    recipe = recipe_for("m", "q", tmp_path, training={"save_only_model": True})
    write_checkpoint(tmp_path)
    (tmp_path / "recipe.json").write_text(to_json(recipe))
    with pytest.raises(ConfigError, match=r"its checkpoints hold no optimiser \(training.save_only_model\)"):
        run_folder.claim(recipe_for("m", "q", tmp_path), resume=True)


@pytest.mark.parametrize(
    ("training", "wanted"),
    [
        ({}, ("steps", 0.1, "steps", 0.1)),
        ({"eval_steps": 5}, ("steps", 5, "steps", 5)),
        ({"save_steps": 0.5}, ("steps", 0.5, "steps", 0.5)),
        ({"eval_strategy": "epoch"}, ("epoch", 0.1, "epoch", 0.1)),
        ({"save_strategy": "epoch"}, ("epoch", 0.1, "epoch", 0.1)),
        ({"save_strategy": "best", "eval_steps": 3}, ("steps", 3, "best", 3)),
        ({"eval_steps": 2, "save_steps": 4}, ("steps", 2, "steps", 4)),
    ],
)
def test_the_best_checkpoint_can_be_kept_with_our_defaults(tmp_path, training, wanted):
    for changes in ({"early_stopping": {"patience": 3}}, {}):
        best = {} if changes else {"load_best_model_at_end": True}
        args = trainer_arguments(recipe_for("m", "q", tmp_path, training={**training, **best}, **changes))
        assert args.load_best_model_at_end
        got = (args.eval_strategy.value, args.eval_steps, args.save_strategy.value, args.save_steps)
        assert got == wanted


@pytest.mark.slow
def test_a_damaged_checkpoint_makes_way_for_the_one_before_and_the_losses_are_the_same(
    llama, questions_file, tmp_path, caplog
):
    straight, resumed = (
        recipe_for(llama, questions_file, tmp_path / name, training={"save_steps": 3}) for name in "ab"
    )
    train(straight)
    kill_at_step_seven(resumed, tmp_path)
    flip(tmp_path / "b/checkpoint-6/optimizer.pt")
    with caplog.at_level("INFO", logger="flashbone"):
        train(resumed, resume=True)
    assert "checkpoint-6 is not used: optimizer.pt is damaged" in caplog.text
    assert f"going on from {tmp_path / 'b/checkpoint-3'}" in caplog.text
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")


@pytest.mark.slow
def test_early_stopping_keeps_the_best_step_and_survives_a_kill(llama, questions_file, tmp_path):
    """The held-out rows answer the questions otherwise, so that their loss soon rises."""
    training = {"max_steps": 40, "learning_rate": 0.05, "eval_steps": 2, "lr_scheduler_type": "constant"}
    rows = questions(8)
    others = [{**row, "completion": other["completion"]} for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    data = DataRecipe(str(questions_file), eval=str(tmp_path / "others.jsonl"))
    changes = {"early_stopping": {"patience": 3}, "training": training, "data": data}
    a, b = (recipe_for(llama, questions_file, tmp_path / name, **changes) for name in "ab")
    summary = train(a).summary
    losses = {row["step"]: row["eval_loss"] for row in metrics_of(tmp_path / "a") if "eval_loss" in row and row["step"]}
    best = min(losses, key=lambda step: (losses[step], step))
    assert summary["best_step"] == best
    assert summary["steps"] == best + 6 < 40
    assert summary["eval_loss_after"] == losses[best]
    assert (tmp_path / f"a/checkpoint-{best}").is_dir()
    adapters = [tmp_path / "a" / place / "adapter_model.safetensors" for place in ("adapter", f"checkpoint-{best}")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()

    kill_at_step_seven(b, tmp_path)
    assert train(b, resume=True).summary["best_step"] == best
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")
    (tmp_path / "b/summary.json").unlink()  # killed when it had stopped
    again = train(b, resume=True).summary
    assert (again["best_step"], again["steps"], again["eval_loss_after"]) == (best, best + 6, losses[best])
    assert (tmp_path / "b/adapter/adapter_model.safetensors").read_bytes() == adapters[0].read_bytes()
