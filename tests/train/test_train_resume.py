"""Runs that were killed, finished or disturbed: resumed to the same losses, or left as they were."""

import errno
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_runs import kill_at_step_seven, metrics_of, recipe_for

from flashbone.errors import ConfigError, FlashboneError
from flashbone.train.folder import RunFolder
from flashbone.train.run import train
from helpers.comparison import Promise, same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_losses_and_the_adapter_of_one_never_killed(llama, questions_file, tmp_path):
    changes = {
        "adapter": {"r": 8, "variant": "bat-row", "dropout": 0.1},
        "training": {"save_steps": 3, "logging_steps": 4, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    }
    straight, resumed = (recipe_for(llama, questions_file, tmp_path / name, **changes) for name in ("a", "b"))
    train(straight)
    kill_at_step_seven(resumed, tmp_path)
    result = train(resumed, resume=True)

    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")
    blocks = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("a", "b")]
    assert blocks[0].keys() == blocks[1].keys()
    assert all(same_bits(blocks[1][key], blocks[0][key], Promise.RESUMED) for key in blocks[0])
    assert any(block.abs().max() > 0 for block in blocks[0].values())
    assert result.summary["eval_loss_before"] is not None


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_is_finished_without_another(llama, questions_file, tmp_path):
    recipe = recipe_for(llama, questions_file, tmp_path / "a")
    first = train(recipe).summary
    adapter = load_file(tmp_path / "a/adapter/adapter_model.safetensors")
    rows = metrics_of(tmp_path / "a")
    (tmp_path / "a/summary.json").unlink()
    again = train(recipe, resume=True).summary
    assert (again["steps"], again["eval_loss_after"]) == (10, first["eval_loss_after"])
    assert metrics_of(tmp_path / "a") == rows
    after = load_file(tmp_path / "a/adapter/adapter_model.safetensors")
    assert all(same_bits(after[key], adapter[key], Promise.STORED) for key in adapter)


@pytest.mark.slow
def test_a_checkpoint_cut_short_by_the_kill_is_passed_over(llama, questions_file, tmp_path):
    recipe = recipe_for(llama, questions_file, tmp_path / "a", training={"save_steps": 5})
    train(recipe)
    (tmp_path / "a/summary.json").unlink()
    (tmp_path / "a/checkpoint-10/trainer_state.json").write_text('{"global_st')
    assert RunFolder(recipe.output).last_checkpoint().name == "checkpoint-5"
    assert train(recipe, resume=True).summary["steps"] == 10


@pytest.mark.slow
def test_a_finished_run_says_so_and_is_left_alone(llama, questions_file, tmp_path, caplog):
    recipe = recipe_for(llama, questions_file, tmp_path / "a")
    first = train(recipe)
    stamp = (tmp_path / "a/adapter/adapter_model.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO", logger="flashbone"):
        again = train(recipe, resume=True)
    assert again.summary == first.summary
    assert "is finished; nothing to do" in caplog.text
    assert (tmp_path / "a/adapter/adapter_model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_a_finished_run_can_be_given_more_steps(llama, questions_file, tmp_path):
    train(recipe_for(llama, questions_file, tmp_path / "a"))
    longer = recipe_for(llama, questions_file, tmp_path / "a", training={"max_steps": 14})
    assert train(longer, resume=True).summary["steps"] == 14


@pytest.mark.slow
def test_resuming_without_a_checkpoint_starts_afresh(llama, questions_file, tmp_path, caplog):
    with caplog.at_level("INFO", logger="flashbone"):
        summary = train(recipe_for(llama, questions_file, tmp_path / "a"), resume=True).summary
    assert summary["steps"] == 10
    assert "no checkpoint in" in caplog.text


@pytest.mark.slow
def test_an_output_with_a_run_is_refused_and_left_as_it_was(llama, questions_file, tmp_path):
    recipe = recipe_for(llama, questions_file, tmp_path / "a")
    train(recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume, or choose another output"):
        train(recipe)
    other = recipe_for(llama, questions_file, tmp_path / "a", adapter={"r": 4})
    with pytest.raises(ConfigError, match=r"another recipe: adapter\.r was 8, is 4"):
        train(other, resume=True)
    for name, value in {"learning_rate": 1e-5, "weight_decay": 0.1, "adam_beta2": 0.9, "optim": "adafactor"}.items():
        other = recipe_for(llama, questions_file, tmp_path / "a", training={name: value, "max_steps": 12})
        with pytest.raises(ConfigError, match=rf"another recipe: training\.{name} was \S+, is '?{value}"):
            train(other, resume=True)  # the checkpoint's optimiser would keep its own value
    assert before == {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),  # seen on a full tmpfs
    ],
)
def test_a_full_disk_is_one_clear_line_and_leaves_no_half_written_file(
    llama, questions_file, tmp_path, monkeypatch, error
):
    def full(obj, path):
        Path(path).write_bytes(b"half")
        raise error

    recipe = recipe_for(llama, questions_file, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.trainer.torch.save", full)
        with pytest.raises(FlashboneError, match="run: no space left on device; free some, then continue with") as got:
            train(recipe)
    assert "\n" not in str(got.value)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run/adapter").exists()
    assert train(recipe, resume=True).summary["steps"] == 10


@pytest.mark.slow
def test_a_failed_save_of_the_adapter_leaves_no_adapter(llama, questions_file, tmp_path, monkeypatch):
    def broken(self, folder, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr("transformers.tokenization_utils_base.PreTrainedTokenizerBase.save_pretrained", broken)
    with pytest.raises(FlashboneError, match="no space left on device"):
        train(recipe_for(llama, questions_file, tmp_path / "run", training={"save_strategy": "no"}))
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith("adapter")]


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_record_of_an_earlier_run_is_named_with_the_remedy(content, llama, questions_file, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.json").write_text(content)
    with pytest.raises(FlashboneError, match=r"recipe.json: .*JSON.*; delete it, or choose another output"):
        train(recipe_for(llama, questions_file, out), resume=True)
    assert (out / "recipe.json").read_text() == content
