"""`flashbone train` under accelerate's launcher, in two processes."""

import json
from pathlib import Path

import pytest
import small_runs  # noqa: F401  (finds tiny_llama)
from launching import launch
from peft import PeftModel
from tiny_llama import questions, write_tiny_llama
from transformers import AutoModelForCausalLM

from flashbone.errors import ConfigError
from flashbone.train.recipe import DataRecipe, Recipe
from flashbone.train.run import train

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


def test_a_run_under_fsdp2_learns_and_leaves_a_whole_adapter(workplace):
    launch("fsdp2", str(HERE / "pretend.py"), "train", "c.yaml")
    summary = json.loads((workplace / "runs/a/summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.1
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
