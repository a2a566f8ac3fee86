"""Classifiers of the encoder families: what their checkpoints lack is trained, saved with the adapter, and restored."""

from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from training_runs import recipe_for
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flashbone import BoneConfig
from flashbone.errors import ConfigError
from flashbone.evaluate.run import Request, evaluate
from flashbone.files.folders import in_saved_module
from flashbone.train.recipe import DataRecipe
from flashbone.train.run import train
from flashbone.tuner.layers.layer import bone_layers
from flashbone.tuner.model.acting import InertAdapterWarning
from helpers.comparison import close
from helpers.encoders import ENCODERS, write_encoder

LABELS = ("bird", "cat", "dog")


@pytest.fixture
def rows(jsonl):
    return jsonl([{"text": f"the {name} sat", "label": name} for name in LABELS] * 4)


def classifier_recipe(base, rows, folder, **changes):
    data = DataRecipe(str(rows), eval=str(rows))
    training = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    return recipe_for(base, rows, folder / "run", task="classification", data=data, training=training, **changes)


def figures_of(model, adapter, rows) -> dict[str, float]:
    measured = evaluate(Request(str(model), adapter, classification=rows, device="cpu"))
    return {figure.name: figure.value for figure in measured.evaluations[0].figures}


def on_a_fresh_base(base, adapter) -> PeftModel:
    """The adapter on the base, whose own head is random."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    model.config.pad_token_id = 0
    return PeftModel.from_pretrained(model, adapter).eval()


def each_family():
    """Three of the first tier, which lack a pooler, a layer before the classifier, and a head of another name."""
    first = ("deberta-v2", "distilbert", "xlnet")
    return [pytest.param(family, marks=[] if family in first else pytest.mark.slow) for family in ENCODERS]


@pytest.mark.parametrize("family", each_family())
def test_a_familys_classifier_is_restored_whole_from_base_and_adapter(family, rows, tmp_path):
    base = write_encoder(family, tmp_path / "base")
    torch.manual_seed(0)
    # BigBird's classifier reads no pooler: an adapter there learns nothing, which the run says and does not stop for.
    unread = pytest.warns(InertAdapterWarning, match=r"^bert\.pooler: .* no gradient came back to what they returned")
    with unread if family == "bigbird" else nullcontext():
        summary = train(classifier_recipe(base, rows, tmp_path, merge=True)).summary
    adapter = tmp_path / "run/adapter"
    values = figures_of(base, adapter, rows)
    assert values["accuracy"] == summary["eval_accuracy_after"]
    assert values["cross-entropy (nats)"] == pytest.approx(summary["eval_loss_after"], rel=1e-5)
    assert summary["eval_loss_after"] != summary["eval_loss_before"]

    tokens = AutoTokenizer.from_pretrained(adapter)(["the cat sat", "the dog"], padding=True, return_tensors="pt")
    models = [on_a_fresh_base(base, adapter) for _ in range(2)]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/merged").eval()
    with torch.no_grad():
        first, second, third = (model(**tokens).logits for model in (*models, merged))
    assert close(second, first, torch.float32)
    assert close(third, first, torch.float32)

    config = models[0].peft_config["default"]
    adapted = [name for name, _ in bone_layers(models[0].get_base_model())]
    assert all(in_saved_module(f"{name}.weight", config.modules_to_save) for name in ENCODERS[family][2].split())
    assert adapted
    assert not [name for name in adapted if in_saved_module(f"{name}.weight", config.modules_to_save)]


def test_a_head_of_another_number_of_labels_is_trained_and_restored_whatever_its_name(rows, tmp_path):
    """transformers says mismatched of it, not missing; and PEFT does not know XLNet's by its name."""
    base = write_encoder("xlnet", tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=5).save_pretrained(base)
    summary = train(classifier_recipe(base, rows, tmp_path, adapter={"r": 4, "target_modules": ["ff.layer_1"]})).summary
    values = figures_of(base, tmp_path / "run/adapter", rows)
    assert values["cross-entropy (nats)"] == pytest.approx(summary["eval_loss_after"], rel=1e-5)


def test_an_adapter_that_lacks_what_the_base_lacks_is_refused_by_name(rows, tmp_path):
    """As flashbone wrote them before it saved such modules."""
    base = write_encoder("xlnet", tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    fields = {"task_type": "SEQ_CLS", "modules_to_save": ["sequence_summary"], "target_modules": ["ff.layer_1"]}
    with pytest.warns(UserWarning, match="has no logits_proj"):
        get_peft_model(model, BoneConfig(r=4, **fields)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"adapter .*: brings no logits_proj, and neither does the checkpoint of"):
        evaluate(Request(str(base), tmp_path / "adapter", classification=rows, labels=LABELS, device="cpu"))
