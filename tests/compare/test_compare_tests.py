"""The test at the end of a run: accuracy on a real classifier, exact match on a language model, overlaps told."""

import importlib.util
import json
from pathlib import Path

import pytest
from compared import results

from flashbone.compare.report import comparison_markdown
from flashbone.errors import ConfigError
from helpers.encoders import write_encoder

pytestmark = pytest.mark.slow

WORDS = {"sport": "match goal team win", "money": "bank rate market price"}


@pytest.fixture(scope="module")
def albert() -> Path:
    spec = importlib.util.find_spec("rxnmapper")
    assert spec is not None
    return Path(spec.submodule_search_locations[0]) / "models/transformers/albert_heads_8_uspto_all_1310k"


@pytest.fixture
def news(tmp_path):
    """Texts of two classes; training and test rows are told apart by a number in them."""

    def write(name: str, numbers: range) -> str:
        rows = [{"text": f"{WORDS[label]} {number}", "label": label} for number in numbers for label in WORDS]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def test_a_classifier_is_compared_by_accuracy(config, albert, news):
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "eval_steps": 1, "use_cpu": True, "max_length": 16}
    rows = results(
        config(
            model=str(albert),
            task="classification",
            data={"path": news("train.jsonl", range(12)), "eval": 8, "test": news("test.jsonl", range(100, 110))},
            methods=["bone", "orthogonal", "linear", "full"],
            target_modules=["query", "value"],
            seeds=[0],
            learning_rates=[1e-3],
            training=training,
        )
    )
    header, methods, runs = rows[0], rows[1:5], rows[5:]
    assert (header["metric"], header["higher_is_better"], header["fairness"]["problems"]) == ("accuracy", True, [])
    assert [row["status"] for row in methods] == ["ok"] * 4
    head = methods[2]["trainable_parameters"]
    assert methods[0]["trainable_parameters"] == methods[0]["adapter_parameters"] + head
    for run in runs:
        assert run["test"]["accuracy"] == pytest.approx(sum(run["test_scores"]) / 20)
        assert set(run["test_scores"]) <= {0, 1}
        assert len(run["held_out"]["accuracy"]) == 3
    assert len({run["digest"] for run in runs}) == 1


def test_an_adapter_of_a_pooler_that_no_head_reads_is_named_and_stops_no_run(config, news, tmp_path):
    base = write_encoder("bigbird", tmp_path / "base")
    data = {"path": news("train.jsonl", range(12)), "eval": 4, "test": news("test.jsonl", range(100, 102))}
    fields = {"data": data, "methods": ["bone"], "seeds": [0]}
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "max_length": 16}
    targets = {"target_modules": ["query", "pooler"], "learning_rates": [1e-3], "training": training}
    rows = results(config(model=str(base), task="classification", **fields, **targets))
    assert rows[1]["status"] == "ok"
    (log,) = tmp_path.rglob("log.txt")
    assert "bert.pooler: these layers ran, and no gradient came back" in log.read_text()


def test_the_bounds_train_what_they_say(albert):
    """Linear probing trains the head alone, full fine-tuning everything."""
    from flashbone.compare.attaching import attach
    from flashbone.compare.methods import METHODS
    from flashbone.train.models import load_classifier
    from flashbone.train.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(str(albert))
    trained = {}
    for name in ("linear", "full"):
        model = attach(load_classifier(str(albert), "float32", ["a", "b"], tokenizer), METHODS[name], None, 0)
        trained[name] = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained["linear"] == {"classifier.weight", "classifier.bias"}
    assert trained["full"] == {n for n, _ in model.named_parameters()}


def test_answers_are_compared_by_exact_match(config, rows, tmp_path):
    test = [{"prompt": "where was it ?", "completion": f" so it is #### {number}"} for number in range(6)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    data = {"path": str(rows / "train.jsonl"), "eval": 16, "test": str(tmp_path / "answers.jsonl")}
    answers = {"max_new_tokens": 4, "batch_size": 4}
    found = results(
        config(methods=["bone"], seeds=[0], learning_rates=[1e-3], metric="exact_match", data=data, answers=answers)
    )
    assert found[0]["metric"] == "exact_match"
    assert found[1]["status"] == "ok"
    assert found[2]["test"]["exact_match"] == sum(found[2]["test_scores"]) / 6
    assert found[2]["test"]["loss"] > 0


def test_exact_match_is_measured_beside_the_loss(config, rows, tmp_path):
    fields = {"methods": ["bone"], "seeds": [0], "learning_rates": [1e-3]}
    answered = config(**fields, answers={"max_new_tokens": 4}, output=str(tmp_path / "answered"))
    beside, alone = results(answered)[2], results(config(**fields))[2]
    assert beside["test"] == {**alone["test"], "exact_match": 0.0}
    assert beside["test_scores"] == alone["test_scores"]
    assert "| 0.0 % |" in comparison_markdown(tmp_path / "answered" / "results.jsonl")


def test_texts_without_answers_cannot_be_matched(config, tmp_path):
    for name, start in (("train", 0), ("test", 100)):
        texts = [{"text": f"the cat sat {'. ' * number}"} for number in range(start, start + 24)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    data = {"path": str(tmp_path / "train.jsonl"), "eval": 4, "test": str(tmp_path / "test.jsonl")}
    with pytest.raises(ConfigError, match=r"data\.test has no prompts and answers"):
        results(config(methods=["bone"], seeds=[0], learning_rates=[1e-3], metric="exact_match", data=data))
    assert not (tmp_path / "out").exists()


def test_test_rows_among_the_training_rows_are_told(config, rows):
    data = {"path": str(rows / "train.jsonl"), "eval": 16, "test": str(rows / "train.jsonl")}
    found = results(config(methods=["bone"], seeds=[0], learning_rates=[1e-3], data=data))
    problems = found[0]["fairness"]["problems"]
    assert any("of the test rows are also learned, word for word" in problem for problem in problems)
    assert any("of the test rows are also held out, word for word" in problem for problem in problems)
