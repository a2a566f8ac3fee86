"""Runs of dpo, kto and reward on a tiny model: what they learn, from which reference, how they resume and merge."""

import functools
import inspect
import json
import math
from pathlib import Path

import pytest
import torch
import trl.trainer.dpo_trainer
from training_runs import metrics_of, recipe_for, stop_at

from flashbone import variants
from flashbone.errors import ConfigError
from flashbone.merge import merge_checkpoint
from flashbone.train.plan import plan
from flashbone.train.report import plot_losses, print_summary
from flashbone.train.run import train
from helpers.comparison import close

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]
TASKS = ("dpo", "kto", "reward")
LN_2 = pytest.approx(math.log(2), abs=1e-6)
PROMPT, BETTER, WORSE = "where was the {} {} ?", " on the mat . yes it sat", " under a tree no"
TRAINING = {"max_steps": 6, "logging_steps": 1, "save_steps": 2, "eval_steps": 3, "learning_rate": 2e-2}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file of rows for each task."""
    folder = tmp_path_factory.mktemp("preferences")
    prompts = [PROMPT.format(size, animal) for size in ("big", "small", "red", "blue") for animal in ("cat", "dog")] * 5
    pairs = [{"prompt": prompt, "chosen": BETTER, "rejected": WORSE} for prompt in prompts]
    labelled = [
        {"prompt": prompt, "completion": answer, "label": answer == BETTER}
        for prompt in prompts
        for answer in (BETTER, WORSE)
    ]
    places = {}
    for task, rows in (("dpo", pairs), ("reward", pairs), ("kto", labelled)):
        places[task] = folder / f"{task}.jsonl"
        places[task].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return places


def recipe_of(llama, files, task, output, **changes):
    changes = {"samples": 0, **changes, "training": {**TRAINING, **changes.get("training", {})}}
    return recipe_for(llama, files[task], output, task=task, **changes)


@pytest.fixture(scope="module")
def runs(llama, files, tmp_path_factory):
    """Runs a task, merged, when it is asked for first."""
    folder = tmp_path_factory.mktemp("runs")
    return functools.cache(lambda task: train(recipe_of(llama, files, task, folder / task, merge=True, samples=1)))


@pytest.mark.parametrize("task", TASKS)
def test_a_run_learns_what_is_better(runs, task, capsys, tmp_path):
    summary, rows = runs(task).summary, metrics_of(runs(task).folder.path)
    held_out = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in held_out] == [0, 3, 6]
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["eval_reward_margin_after"] > summary["eval_reward_margin_before"] + 0.1
    assert summary["eval_reward_margin_after"] == held_out[-1]["eval_rewards/margins"]
    if task != "kto":
        assert summary["eval_reward_accuracy_after"] == held_out[-1]["eval_rewards/accuracies"] == 1
    assert len(summary["samples"]) == (task != "reward")
    print_summary(summary, runs(task).folder.path, [])
    assert "held-out reward margin, before -> after" in capsys.readouterr().out
    assert plot_losses(runs(task).folder.metrics, tmp_path / "loss.png").stat().st_size > 20_000


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_the_first_reference_is_the_model_itself(runs, task):
    held_out, first = metrics_of(runs(task).folder.path)[:2]
    wanted = LN_2 if task == "dpo" else pytest.approx(0.5, abs=1e-6)
    assert held_out["eval_loss"] == wanted
    assert first["loss"] == wanted
    assert held_out["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)


def written_adapter(llama, variant, folder) -> Path:
    """An adapter that changes what the model says."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from flashbone import BoneConfig

    fields = {"variant": variant, "r": 8, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), BoneConfig(**fields))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", variants.VARIANTS)
@pytest.mark.parametrize("start", ["new", "init_adapter"])
def test_the_first_loss_of_dpo_is_ln_2_for_every_variant(llama, files, tmp_path, variant, start):
    """Of an adapter that a run goes on with, the reference is the model with it."""
    adapter = {"r": 8, "variant": variant}
    if start == "init_adapter":
        adapter = {}
        written_adapter(llama, variant, tmp_path / "start")
    fields = {"init_adapter": str(tmp_path / "start")} if start == "init_adapter" else {}
    training = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "learning_rate": 2e-2}
    recipe = recipe_of(llama, files, "dpo", tmp_path / "run", adapter=adapter, training=training, **fields)
    recipe.data.eval = None
    train(recipe)
    first, second = (row["loss"] for row in metrics_of(tmp_path / "run"))
    assert first == LN_2
    assert abs(second - first) > 1e-5
    assert not (tmp_path / "run" / "adapter" / "ref").exists()


@pytest.mark.parametrize("task", ["dpo", "kto", "reward"])
def test_a_stopped_run_resumes_to_the_same_losses(llama, files, runs, tmp_path, monkeypatch, task):
    whole = metrics_of(runs(task).folder.path)
    stop_and_resume(recipe_of(llama, files, task, tmp_path / "run"), monkeypatch)
    assert metrics_of(tmp_path / "run") == whole


@pytest.mark.slow
def test_a_stopped_run_that_went_on_with_an_adapter_keeps_its_reference(llama, files, tmp_path, monkeypatch):
    start = {"adapter": {}, "init_adapter": str(written_adapter(llama, "bone", tmp_path / "start"))}
    train(recipe_of(llama, files, "dpo", tmp_path / "whole", **start))
    stop_and_resume(recipe_of(llama, files, "dpo", tmp_path / "run", **start), monkeypatch)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert not list((tmp_path / "run").rglob("ref"))


def stop_and_resume(recipe, monkeypatch) -> None:
    stop_at(5, recipe, monkeypatch)
    train(recipe, resume=True)


def test_the_merged_model_answers_as_the_adapted_one(llama, runs):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = runs("dpo").folder
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), place.adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(place.merged).eval()
    tokens = AutoTokenizer.from_pretrained(place.adapter)(PROMPT, return_tensors="pt")
    with torch.no_grad():
        assert close(merged(**tokens).logits, adapted(**tokens).logits)


@pytest.mark.parametrize("how", ["recipe", "command"])
def test_a_merged_reward_model_scores_as_the_adapted_one(llama, runs, tmp_path, how):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification as Classifier
    from transformers import AutoTokenizer

    place = runs("reward").folder
    folder = place.merged
    if how == "command":
        folder = tmp_path / "merged"
        merge_checkpoint(llama, place.adapter, folder)
    merged = Classifier.from_pretrained(folder).eval()
    assert (merged.config.num_labels, merged.config.pad_token_id) == (1, 0)
    adapted = PeftModel.from_pretrained(Classifier.from_pretrained(llama, num_labels=1), place.adapter).eval()
    adapted.config.pad_token_id = 0
    texts = [PROMPT.format("big", "cat") + answer for answer in (BETTER, WORSE)]
    tokens = AutoTokenizer.from_pretrained(place.adapter)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        better, worse = merged(**tokens).logits
        assert close(merged(**tokens).logits, adapted(**tokens).logits)
    assert better > worse


@pytest.mark.parametrize("task", TASKS)
def test_a_dry_run_builds_the_same_trainer(llama, files, runs, tmp_path, task):
    made = plan(recipe_of(llama, files, task, tmp_path / "run"))
    assert made.steps == runs(task).summary["steps"]
    assert made.parameters["trainable_parameters"] == runs(task).summary["trainable_parameters"]
    (rows,) = made.rows.values()
    assert (rows.kept, rows.cut) == (80 if task == "kto" else 40, 0)
    assert any(BETTER.strip() in "".join(example.learned) for example in made.examples)


REFUSED = {
    "dpo": {
        "training.truncation_mode: keep_end is not for task dpo": {"training": {"truncation_mode": "keep_end"}},
        "training.sync_ref_model: the reference is": {"training": {"sync_ref_model": True}},
        "training.precompute_ref_log_probs: not with init_adapter": {
            "init_adapter": "a",
            "training": {"precompute_ref_log_probs": True},
        },
        "training.padding_free: TRL has it off": {"training": {"padding_free": True}},
        "adapter.dropout: task dpo turns all dropout off": {"adapter": {"r": 8, "dropout": 0.1}},
        "rwkv: RWKV models are for task sft, not dpo": {"rwkv": {"chunk_ctx": 8}},
        "training.max_length 8 cuts": {"training": {"max_length": 8}},
    },
    "kto": {"batch size must be > 1": {"training": {"per_device_train_batch_size": 1}}},
    "reward": {"init_adapter: .* are for task sft, not reward; merge the adapter": {"init_adapter": "somewhere"}},
}


if "not supported: the log-probabilities" in inspect.getsource(trl.trainer.dpo_trainer):  # older ones call the head
    REFUSED["dpo"]["lm_head"] = {"adapter": {"r": 8, "target_modules": ["lm_head"]}}


@pytest.mark.parametrize(("task", "message"), [(task, words) for task in REFUSED for words in REFUSED[task]])
def test_what_does_not_go_together_is_refused_before_anything_is_written(llama, files, tmp_path, task, message):
    with pytest.raises(ConfigError, match=message):
        train(recipe_of(llama, files, task, tmp_path / "run", **REFUSED[task][message]))
    assert not (tmp_path / "run").exists()


def test_kto_needs_both_labels(llama, jsonl, tmp_path):
    rows = [{"prompt": "the cat", "completion": BETTER, "label": True}] * 20
    with pytest.raises(ConfigError, match="all labels are the same"):
        train(recipe_for(llama, jsonl(rows), tmp_path / "run", task="kto"))
