"""What a run's folder keeps beside its results: checkpoints that prove to be whole, what the run read, whose it is."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from training_runs import kill_at_step_seven, metrics_of, recipe_for

from flashbone.cli import main
from flashbone.errors import ConfigError, FlashboneError
from flashbone.files.outputs import LOCK
from flashbone.files.records import to_json
from flashbone.train import fitting
from flashbone.train import folder as run_folder
from flashbone.train.arguments import trainer_arguments
from flashbone.train.checkpoints import MANIFEST, checkpoints, problem, write_manifest
from flashbone.train.folder import RunFolder
from flashbone.train.inputs import Inputs, _base_files, _hash, _rows, _tokenizer, check_same
from flashbone.train.recipe import DataRecipe
from flashbone.train.run import train
from helpers.tiny_llama import tiny_tokenizer, write_tiny_llama

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


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


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


INPUTS = Inputs("rows", "held out", "tokenizer", "base", processes=2, batch=4, accumulated=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": "x"}, r"the training rows \(their order or content\)"),
        ({"held_out": None}, "the held-out rows"),
        ({"tokenizer": "x", "base": "y"}, r"the tokenizer \(.*\); the model's files"),
        (
            {"batch": 8},
            "16 rows a step .*is 32 rows a step .*_batch_size 8 and .*_accumulation_steps 1 give",
        ),
        ({"processes": 1}, "2 processes, .*is 8 rows.*1 process, .*_batch_size 4 and .*_accumulation_steps 4 give"),
        ({"processes": 3}, "; 2 processes give the same order"),
        ({"batch": 3}, "_batch_size 4 and .*_accumulation_steps 2 give"),
        ({"processes": 16, "accumulated": 1}, "_batch_size 1 and .*_accumulation_steps 1 give"),
    ],
)
def test_what_a_run_reads_may_not_change(tmp_path, changes, message):
    check_same(INPUTS, replace(INPUTS, processes=1, batch=2, accumulated=8), tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        check_same(INPUTS, replace(INPUTS, **changes), tmp_path)
    assert "\n" not in str(error.value)


def test_rows_are_told_apart_by_order_and_content():
    rows = [{"prompt": "a", "n": 1, "input_ids": [1, 2]}, {"prompt": "b", "n": None, "input_ids": [3]}]
    variants = [
        rows,
        rows[::-1],
        [{**rows[0], "n": 2}, rows[1]],
        [{**rows[0], "input_ids": [1]}, {**rows[1], "input_ids": [2, 3]}],
    ]
    hashes = [_rows(Dataset.from_list(variant)) for variant in variants]
    assert len(set(hashes)) == len(variants)
    assert hashes[0] == _rows(Dataset.from_list(rows[::-1]).select([1, 0])) == _rows(Dataset.from_list(rows))
    assert _rows(Dataset.from_list(rows).to_iterable_dataset()) != _rows(
        Dataset.from_list(rows[:1]).to_iterable_dataset()
    )


def test_tokenizers_are_told_apart_by_template_tokens_and_words():
    before = _tokenizer(tiny_tokenizer())
    used = tiny_tokenizer()
    used(["the cat", "a"], padding=True, truncation=True, max_length=3)
    assert _tokenizer(used) == before
    for change in (
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda tokenizer: tokenizer.add_tokens(["quokka"]),
        lambda tokenizer: setattr(tokenizer, "eos_token", "the"),
    ):
        tokenizer = tiny_tokenizer()
        change(tokenizer)
        assert _tokenizer(tokenizer) != before


@pytest.mark.parametrize("whole", [2**26, 1000])
def test_bases_are_told_apart_by_the_content_of_their_files(tmp_path, monkeypatch, whole):
    monkeypatch.setattr("flashbone.train.inputs.WHOLE", whole)  # also as files too large to be read whole
    recipe = recipe_for(write_tiny_llama(tmp_path / "m"), "q", tmp_path / "out")
    before = _hash(_base_files(recipe))
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    assert _hash(_base_files(replace(recipe, model=str(tmp_path / "copy")))) == before
    flip(tmp_path / "m/model.safetensors")
    assert _hash(_base_files(recipe)) != before


def test_a_second_start_is_refused_with_the_process_that_has_the_folder(tmp_path):
    recipe = recipe_for("m", "q", tmp_path / "a/out")
    hold = "import sys; from flashbone.files.outputs import alone; from pathlib import Path\n"
    hold += "with alone(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, recipe.output]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(
                ConfigError, match=rf"another run is writing to it \(process {process.pid}\); wait for it"
            ):
                train(recipe, resume=resume)
        process.kill()
    assert (Path(recipe.output) / LOCK).exists()  # of a dead process: no obstacle
    with pytest.raises(FlashboneError, match="model m: no such folder"):
        train(recipe)
    assert not Path(recipe.output).exists()


without_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")


@pytest.mark.parametrize(
    "flags",
    [
        ["--training.learning_rate", "abc"],
        ["--training.max_steps", "ten"],
        ["--training.report_to", "wandb"],
        ["--training.report_to", "wandbb"],
        ["--training.optim", "nothing"],
        ["--training.optim", "galore_adamw"],
        ["--training.adam_beta1", "2"],
        ["--training.lr_scheduler_kwargs", "{a: 1}"],
        ["--training.lr_scheduler_kwargs", "x"],
        ["--training.learning_rate", "-1"],
        ["--training.max_steps", "0"],
        ["--training.max_steps", "-5"],
        ["--training.num_train_epochs", "0"],
        ["--training.per_device_train_batch_size", "0"],
        ["--training.gradient_accumulation_steps", "-1"],
        ["--training.dataloader_num_workers", "-1"],
        ["--training.eval_steps", "-1"],
        ["--training.packing_strategy", "best"],
        ["--training.train_sampling_strategy", "x"],
        ["--training.log_level", "loud"],
        ["--training.log_level_replica", "loud"],
        ["--training.pad_to_multiple_of", "many"],
        ["--training.activation_checkpointing_kwargs", "x"],
        ["--training.dataloader_persistent_workers", "true"],
        ["--training.dataloader_multiprocessing_context", "x", "--training.dataloader_num_workers", "1"],
        ["--training.dataloader_drop_last=true", "--training.per_device_eval_batch_size", "99"],
        pytest.param(["--training.activation_offloading", "true"], marks=without_accelerator),
        ["--training.accelerator_config", "nope.json"],
        ["--training.dataset_text_field", "body"],
        ["--training.metric_for_best_model", "f1"],
        ["--early_stopping", "{patience: 0}"],
        ["--early_stopping.patience", "3", "--data.eval", "null"],
        ["--early_stopping.patience=3", "--training.load_best_model_at_end=false"],
        ["--training.load_best_model_at_end=true", "--training.eval_strategy=epoch", "--training.save_strategy=steps"],
        ["--training.load_best_model_at_end=true", "--training.save_strategy", "no"],
        ["--training.load_best_model_at_end=true", "--training.save_steps=3", "--training.eval_steps=2"],
        ["--model", "/no/such/model"],
        ["--data.path", "/no/such/rows.jsonl"],
        ["--output", "$NO_SUCH_VARIABLE/out"],
    ],
)
def test_a_refused_start_is_one_line_and_leaves_no_folder(llama, questions_file, tmp_path, capsys, monkeypatch, flags):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = {"model": str(llama), "output": "new/runs/a", "data": {"path": str(questions_file)}}
    Path("c.yaml").write_text(json.dumps(text))
    assert main(["train", "c.yaml", *flags]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("flashbone train: error: ")
    assert "report what that prints" not in lines[0]
    assert [str(place) for place in Path().iterdir()] == ["c.yaml"]


def test_a_run_that_fails_before_its_first_step_leaves_no_run(llama, questions_file, tmp_path, monkeypatch):
    recipe = recipe_for(llama, questions_file, tmp_path / "a/run")

    def fails(trainer, checkpoint):
        raise RuntimeError(f"{len(list(Path(recipe.output).glob('*.json')))} files are written")

    monkeypatch.setattr(fitting, "_fit", fails)
    with pytest.raises(RuntimeError, match="2 files are written"):
        train(recipe)
    assert not (tmp_path / "a").exists()


def test_an_adapter_to_go_on_with_may_not_change(llama, questions_file, tmp_path):
    """Also where no checkpoint was written yet."""
    train(recipe_for(llama, questions_file, tmp_path / "first", training={"max_steps": 1}))
    adapter = tmp_path / "first/adapter"
    recipe = recipe_for(llama, questions_file, tmp_path / "second", training={"save_strategy": "no", "max_steps": 1})
    recipe = replace(recipe, adapter={}, init_adapter=str(adapter))
    train(recipe)
    (tmp_path / "second/summary.json").unlink()  # killed at the end
    flip(adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="changed since its run began: the files of init_adapter; resume with what"):
        train(recipe, resume=True)
    flip(adapter / "adapter_model.safetensors")
    assert train(recipe, resume=True).summary["steps"] == 1


def test_checkpoints_without_an_optimiser_are_no_place_to_go_on(tmp_path):
    recipe = recipe_for("m", "q", tmp_path, training={"save_only_model": True})
    write_checkpoint(tmp_path)
    (tmp_path / "recipe.json").write_text(to_json(recipe))
    with pytest.raises(ConfigError, match=r"its checkpoints hold no optimiser \(training.save_only_model\)"):
        run_folder.claim(recipe_for("m", "q", tmp_path), resume=True)


def test_a_limit_of_file_sizes_is_named_and_what_is_half_written_goes(tmp_path):
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    folder, limits = RunFolder(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        words = r"may write \(ulimit -f\); raise the limit, then continue with --resume"
        with pytest.raises(FlashboneError, match=words), run_folder.disk_errors(folder):
            (tmp_path / "adapter.partial").write_bytes(bytes(9999))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_run_whose_inputs_cannot_be_written_is_none(tmp_path):
    (tmp_path / "inputs.json.partial").mkdir()
    recipe = recipe_for("m", "q", tmp_path)
    with pytest.raises(OSError, match=r"inputs\.json"):
        run_folder.record(recipe, Inputs("", None, "", "", 1, 8, 1))
    assert not RunFolder(tmp_path).holds_a_run()


def test_a_folder_of_the_users_own_stays(questions_file, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FlashboneError):
        train(recipe_for("/no/such/model", questions_file, tmp_path / "mine"))
    assert (tmp_path / "mine").is_dir()


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


def test_a_hub_that_cannot_be_reached_is_one_line(llama, questions_file, tmp_path):
    training = {"push_to_hub": True, "hub_model_id": "nobody/nothing", "hub_token": "hf_none"}
    with pytest.raises(ConfigError, match=r"training\.push_to_hub: .*; log in and connect, or leave it out") as error:
        train(recipe_for(llama, questions_file, tmp_path / "a/run", training=training))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_resumed_run_refuses_other_rows_models_and_batches(llama, questions_file, tmp_path):
    model, rows = tmp_path / "model", tmp_path / "own.jsonl"
    shutil.copytree(llama, model)
    shutil.copy(questions_file, rows)
    recipe = recipe_for(model, rows, tmp_path / "a", training={"save_steps": 3})
    kill_at_step_seven(recipe, tmp_path)
    lines = rows.read_text().splitlines(keepends=True)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file() and path.name != LOCK}

    rows.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(ConfigError, match="changed since its run began: the training rows"):
        train(recipe, resume=True)
    rows.write_text("".join(lines))
    weights = (model / "model.safetensors").read_bytes()
    flip(model / "model.safetensors")
    with pytest.raises(ConfigError, match="changed since its run began: the model's files"):
        train(recipe, resume=True)
    (model / "model.safetensors").write_bytes(weights)
    half = replace(recipe, training={**recipe.training, "per_device_train_batch_size": 4})
    with pytest.raises(ConfigError, match=r"_batch_size 4 and .*_accumulation_steps 2 give the same order"):
        train(half, resume=True)
    assert before == {path: path.read_bytes() for path in before}
    half.training["gradient_accumulation_steps"] = 2
    assert train(half, resume=True).summary["steps"] == 10


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
    """The rate is so high that the held-out loss soon rises."""
    training = {"max_steps": 40, "learning_rate": 0.3, "eval_steps": 2, "lr_scheduler_type": "constant"}
    changes = {"early_stopping": {"patience": 3}, "training": training, "data": DataRecipe(str(questions_file), eval=8)}
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
