"""Scores of classifiers against numbers computed by hand and by training, and where the classes' order comes from."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flashbone.errors import ConfigError, FormatError
from flashbone.evaluate.classification import classification
from flashbone.evaluate.loading import load_labelled_classifier
from flashbone.evaluate.run import Request, evaluate
from flashbone.train.classify import scores

LABELS = ["animal", "place", "other"]
ROWS = [
    {"text": "the cat sat", "label": "animal"},
    {"text": "on a mat under the tree", "label": "place"},
    {"text": "yes no", "label": "other"},
    {"text": "the big dog ran . the small cat", "label": "animal"},
    {"text": "tree mat", "label": "place"},
]


@pytest.fixture(scope="module")
def classifier(llama, tmp_path_factory) -> Path:
    """A folder with a classifier, whose head is random, that names its classes."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    config = LlamaConfig.from_pretrained(llama, id2label=dict(enumerate(LABELS)))
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def one_by_one(folder):
    """Logits of each row, without batches and padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    with torch.no_grad():
        return torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in ROWS])


def test_scores_are_those_of_single_rows_whatever_the_batch(classifier):
    logits = one_by_one(classifier)
    right = torch.tensor([LABELS.index(row["label"]) for row in ROWS])
    want = scores(logits.numpy(), right.numpy())
    loss = float(torch.nn.functional.cross_entropy(logits, right))
    assert 0 < want["accuracy"] < 1
    model, tokenizer, labels = load_labelled_classifier(str(classifier), None, torch.float32, "cpu")
    assert labels == LABELS
    for batch_size in (1, 2, 5):
        found = classification(model, tokenizer, ROWS, labels, batch_size=batch_size)
        got = {one.name: one.value for one in found.figures}
        assert got["accuracy"] == want["accuracy"]
        assert got["macro-F1"] == pytest.approx(want["macro_f1"])
        assert got["cross-entropy (nats)"] == pytest.approx(loss, rel=1e-5)
        assert np.sum(found.details["confusion"]) == 5
        for row, predicted in zip(ROWS, logits.argmax(-1).tolist(), strict=True):
            assert found.details["confusion"][LABELS.index(row["label"])][predicted] > 0


def test_tables_of_classes_hold_precision_and_recall(classifier):
    model, tokenizer, labels = load_labelled_classifier(str(classifier), None, torch.float32, "cpu")
    found = classification(model, tokenizer, ROWS, labels)
    counts = np.array(found.details["confusion"])
    for number, entry in enumerate(found.details["classes"]):
        hits = counts[number, number]
        assert entry["rows"] == [2, 2, 1][number]
        assert entry["recall"] == pytest.approx(hits / counts[number].sum())
        said = counts[:, number].sum()
        assert entry["precision"] == (pytest.approx(hits / said) if said else None)


def test_unknown_labels_of_rows_are_named(classifier):
    model, tokenizer, labels = load_labelled_classifier(str(classifier), None, torch.float32, "cpu")
    with pytest.raises(FormatError, match="has the labels colour, but the model knows animal, place, other"):
        classification(model, tokenizer, [{"text": "red", "label": "colour"}], labels, of="f")


def test_a_model_without_a_head_or_without_names_of_classes_is_refused(llama, classifier, tmp_path):
    with pytest.raises(ConfigError, match=r"not known: the model has no classification head; .*--labels"):
        load_labelled_classifier(str(llama), None, torch.float32, "cpu")
    with pytest.raises(ConfigError, match="has no trained classification head"):
        load_labelled_classifier(str(llama), None, torch.float32, "cpu", labels=["a", "b"])
    with pytest.raises(ConfigError, match=r"got 2 .* its head has 3"):
        load_labelled_classifier(str(classifier), None, torch.float32, "cpu", labels=["a", "b"])
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    for file in classifier.iterdir():
        (nameless / file.name).write_bytes(file.read_bytes())
    config = json.loads((nameless / "config.json").read_text())
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(3)}
    config["label2id"] = {f"LABEL_{i}": i for i in range(3)}
    (nameless / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"no names for them; give them .* --labels"):
        load_labelled_classifier(str(nameless), None, torch.float32, "cpu")
    assert load_labelled_classifier(str(nameless), None, torch.float32, "cpu", labels=LABELS)[2] == LABELS


@pytest.mark.slow
def test_an_adapter_of_a_run_gives_the_runs_accuracy(llama, tmp_path):
    """Its classes, in their order, come from summary.json, the length of texts from the recipe."""
    from flashbone.train.recipe import DataRecipe, Recipe
    from flashbone.train.run import train

    rows = [
        {"text": f"{a} {b} {c}", "label": c} for a in ("the", "a", "it") for b in ("red", "big") for c in ("on", "cat")
    ]
    for name, part in (("t", rows), ("h", rows[2:11])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    summary = train(
        Recipe(
            model=str(llama),
            data=DataRecipe(str(tmp_path / "t.jsonl"), eval=str(tmp_path / "h.jsonl")),
            output=str(tmp_path / "run"),
            task="classification",
            adapter={"r": 8},
            training={"max_steps": 2, "learning_rate": 2e-3, "disable_tqdm": True, "max_length": 3},
        )
    ).summary
    asked = Request(str(llama), tmp_path / "run" / "adapter", classification=tmp_path / "h.jsonl", batch_size=4)
    for request in (asked, dataclasses.replace(asked, merge=True)):
        (found,) = evaluate(request).evaluations
        got = {one.name: one.value for one in found.figures}
        assert got["accuracy"] == pytest.approx(summary["eval_accuracy_after"])
        assert got["macro-F1"] == pytest.approx(summary["eval_macro_f1_after"])
        assert got["cross-entropy (nats)"] == pytest.approx(summary["eval_loss_after"], rel=1e-3)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"no summary.json of `flashbone train` lies beside"):
        evaluate(asked)
