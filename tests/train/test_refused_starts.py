"""A start that is refused or interrupted is one line and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import recipe_for

from flashbone.cli import main
from flashbone.errors import ConfigError, FlashboneError
from flashbone.files.outputs import LOCK
from flashbone.train import fitting
from flashbone.train import folder as run_folder
from flashbone.train.folder import RunFolder
from flashbone.train.inputs import Inputs
from flashbone.train.run import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_ends_before_its_first_step_leaves_no_run(llama, questions_file, tmp_path, monkeypatch, error):
    recipe = recipe_for(llama, questions_file, tmp_path / "a/run")

    def fails(trainer, checkpoint):
        raise error(f"{len(list(Path(recipe.output).glob('*.json')))} files are written")

    monkeypatch.setattr(fitting, "_fit", fails)
    with pytest.raises(error, match="2 files are written"):
        train(recipe)
    assert not (tmp_path / "a").exists()


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


def test_a_hub_that_cannot_be_reached_is_one_line(llama, questions_file, tmp_path):
    training = {"push_to_hub": True, "hub_model_id": "nobody/nothing", "hub_token": "hf_none"}
    with pytest.raises(ConfigError, match=r"training\.push_to_hub: .*; log in and connect, or leave it out") as error:
        train(recipe_for(llama, questions_file, tmp_path / "a/run", training=training))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()
