"""Answers to held-out prompts before and after a training, and rows of a wrong class: shown, and without influence."""

import json

import pytest
from training_runs import metrics_of, recipe_for

from flashbone.errors import ConfigError
from flashbone.evaluate.exact_match import exact_matches
from flashbone.evaluate.loading import load_language_model
from flashbone.train.recipe import DataRecipe, load_recipe
from flashbone.train.report import print_summary
from flashbone.train.run import train
from helpers.tiny_llama import questions

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]
DROPOUT = {"r": 8, "dropout": 0.2}  # so that every random number counts


@pytest.mark.slow
def test_answers_before_and_after_are_the_models_and_change_no_loss(llama, questions_file, tmp_path, capsys):
    import torch

    training = {"max_steps": 4, "save_strategy": "no"}
    fields = {"adapter": DROPOUT, "training": training}
    shown = train(recipe_for(llama, questions_file, tmp_path / "a", **fields, samples=3)).summary
    silent = train(recipe_for(llama, questions_file, tmp_path / "b", **fields)).summary
    assert silent["samples"] == []
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")

    assert len({sample["prompt"] for sample in shown["samples"]}) == 3
    rows = {row["prompt"]: row["completion"] for row in questions(80)}
    for sample in shown["samples"]:
        assert sample["wanted"].split() == rows[sample["prompt"].strip()].split()
    for when, adapter in (("before", None), ("after", tmp_path / "a" / "adapter")):
        model, tokenizer = load_language_model(str(llama), adapter, torch.float32, "cpu")
        asked = [(sample["prompt"], "-") for sample in shown["samples"]]
        want = [row.text for row in exact_matches(model, tokenizer, asked, max_new_tokens=64)]
        assert [sample[when] for sample in shown["samples"]] == want
    assert any(sample["before"] != sample["after"] for sample in shown["samples"])

    capsys.readouterr()
    print_summary(shown, tmp_path / "a", [])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("held out  where was the") for line in lines) == 3
    assert sum(line.startswith("after     ") for line in lines) == 3


@pytest.mark.parametrize("rows", ["messages", "text"])
def test_conversations_show_their_last_question_and_texts_how_they_go_on(llama, jsonl, tmp_path, rows):
    made = questions(24)
    if rows == "messages":
        turns = [("user", "yes ?"), ("assistant", "no"), ("user", "{prompt}"), ("assistant", "{completion}")]
        file = jsonl({"messages": [{"role": r, "content": t.format(**row)} for r, t in turns]} for row in made)
        data = DataRecipe(path=str(file), turns="last")
    else:
        data = DataRecipe(path=str(jsonl({"text": row["prompt"] + row["completion"]} for row in made)))
    training = {"max_steps": 1, "save_strategy": "no"}
    samples = train(recipe_for(llama, "", tmp_path / "run", data=data, training=training, samples=2)).summary["samples"]
    assert len(samples) == 2
    prompts = {row["prompt"] for row in made}
    texts = {(row["prompt"] + row["completion"]) for row in made}
    for sample in samples:
        if rows == "messages":
            assert sample["prompt"] in prompts
        else:
            assert f"{sample['prompt']} {sample['wanted']}".split() in [text.split() for text in texts]


def test_nothing_is_shown_without_held_out_rows(llama, questions_file, tmp_path):
    data = DataRecipe(path=str(questions_file), eval=None)
    training = {"max_steps": 1, "save_strategy": "no"}
    recipe = recipe_for(llama, "", tmp_path / "run", data=data, training=training, samples=3)
    assert train(recipe).summary["samples"] == []


def test_a_classifier_shows_texts_of_a_wrong_class(llama, jsonl, tmp_path, capsys):
    rows = [
        {"text": f"the {('cat', 'dog')[i % 2]} ran {'on ' * (i % 5)}\x1b[31m", "label": "ab"[i % 3 % 2]}
        for i in range(60)
    ]
    data = DataRecipe(path=str(jsonl(rows)), eval=0.5)
    training = {"max_steps": 1, "save_strategy": "no"}
    recipe = recipe_for(llama, "", tmp_path / "run", data=data, task="classification", training=training, samples=3)
    summary = train(recipe).summary
    assert 0 < summary["eval_accuracy_after"] < 1
    labels = {row["text"]: set() for row in rows}
    for row in rows:
        labels[row["text"]].add(row["label"])
    assert len(summary["samples"]) == 3
    for sample in summary["samples"]:
        assert sample["before"] is None
        assert sample["wanted"] in labels[sample["prompt"]]
        assert sample["after"] != sample["wanted"]
    capsys.readouterr()
    print_summary(summary, tmp_path / "run", [])
    out = capsys.readouterr().out
    assert out.count("taken for ") == 3
    assert "\x1b[31m" not in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == summary["samples"]


def test_a_number_below_nothing_is_refused(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("model: m\ndata: {path: d.jsonl}\noutput: o\nsamples: -1\n")
    with pytest.raises(ConfigError, match="samples: got -1, wanted a number of held-out rows, or 0 for none"):
        load_recipe(config)
