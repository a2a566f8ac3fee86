"""Modules that an adapter saves whole are never adapted, and new ones that nothing saves are named."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    LlamaForCausalLM,
    LlamaModel,
)

from flashbone import BoneConfig
from flashbone.tuner.layers.layer import bone_layers
from flashbone.tuner.model.whole import new_parameters, outermost, unsaved_modules
from helpers.comparison import close
from helpers.encoders import BERT, ENCODERS, write_encoder
from helpers.tiny_llama import tiny_config

TASKS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}
IDS = torch.tensor([[1, 5, 6, 7, 2]])


def outputs_of(model) -> torch.Tensor:
    output = model.eval()(input_ids=IDS)
    return output.start_logits + output.end_logits if "start_logits" in output else output.logits


@pytest.mark.parametrize("targets", ["all-linear", {"q_lin", "query", "classifier", "dense", "qa_outputs"}])
@pytest.mark.parametrize("family", ["distilbert", "bert", "roberta"])
@pytest.mark.parametrize("task", TASKS)
def test_what_is_saved_whole_is_never_adapted_and_comes_back(task, family, targets, tmp_path):
    """PEFT saves DistilBERT's pre_classifier, since that ends in "classifier", and learns some heads after adapting."""
    base = write_encoder(family, tmp_path / "base")
    model = TASKS[task].from_pretrained(base)
    unsaved = [name for name in ENCODERS[family][2].split() if "pooler" in name and task == "SEQ_CLS"]
    config = BoneConfig(r=4, target_modules=targets, task_type=task, modules_to_save=unsaved or None)
    adapted = get_peft_model(model, config)
    heads = ("classifier", "qa_outputs", "pooler.dense")
    layers = [name for name, _ in bone_layers(adapted)]
    assert layers
    assert not [name for name in layers if any(head in name for head in heads)]

    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    wanted = outputs_of(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(TASKS[task].from_pretrained(base), tmp_path / "adapter")
    assert close(outputs_of(again), wanted, torch.float32)
    assert close(outputs_of(adapted.merge_and_unload()), wanted, torch.float32)


def messages_of(model, **fields) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, BoneConfig(**{"r": 4, "target_modules": ["query", "q_proj", "q_lin"], **fields}))
    return [str(warning.message) for warning in caught if "its checkpoint" in str(warning.message)]


@pytest.mark.parametrize(
    ("task", "fields", "missing", "remedy"),
    [
        (
            "SEQ_CLS",
            {},
            "bert.pooler.dense, classifier",
            "set task_type=\"SEQ_CLS\" and modules_to_save=['bert.pooler.dense']",
        ),
        ("SEQ_CLS", {"task_type": "SEQ_CLS"}, "bert.pooler.dense", "set modules_to_save=['bert.pooler.dense']"),
        ("SEQ_CLS", {"modules_to_save": ["pooler"]}, "classifier", 'set task_type="SEQ_CLS"'),
        ("TOKEN_CLS", {}, "classifier", 'set task_type="TOKEN_CLS"'),
        ("QUESTION_ANS", {"target_modules": "all-linear"}, "qa_outputs", 'set task_type="QUESTION_ANS"'),
        ("TOKEN_CLS", {"task_type": "FEATURE_EXTRACTION"}, "classifier", "set modules_to_save=['classifier']"),
    ],
)
def test_new_modules_that_nothing_saves_are_named_with_the_field_that_saves_them(
    task, fields, missing, remedy, tmp_path
):
    model = TASKS[task].from_pretrained(write_encoder("bert", tmp_path))
    (message,) = messages_of(model, **fields)
    assert f"its checkpoint has no {missing}, which started at random" in message
    assert message.endswith(remedy)


def test_nothing_is_said_of_models_whose_new_modules_are_saved_or_that_were_not_loaded(tmp_path):
    base = write_encoder("bert", tmp_path / "base")
    saved = {"task_type": "SEQ_CLS", "modules_to_save": ["bert.pooler"]}
    assert not messages_of(AutoModelForSequenceClassification.from_pretrained(base), **saved)
    assert not messages_of(BertForSequenceClassification(BertConfig(**BERT)))
    LlamaForCausalLM(tiny_config(20)).save_pretrained(tmp_path / "llama")
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    resized.resize_token_embeddings(24)  # PEFT saves those
    assert not messages_of(resized)


def test_a_head_of_another_size_and_a_missing_output_projection_are_new(tmp_path):
    model_class, config, _ = ENCODERS["distilbert"]
    assert model_class is not DistilBertForSequenceClassification
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "two")
    three = {"num_labels": 3, "ignore_mismatched_sizes": True}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two", **three)
    assert new_parameters(model) == ["classifier.weight", "classifier.bias"]
    LlamaModel(tiny_config(20)).save_pretrained(tmp_path / "llama")
    assert new_parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "llama")) == ["lm_head.weight"]
    tied = tiny_config(20)
    tied.tie_word_embeddings = True
    LlamaForCausalLM(tied).save_pretrained(tmp_path / "tied")
    assert not new_parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "tied"))


def test_modules_hold_what_peft_can_wrap_and_none_is_inside_another(tmp_path):
    """A parameter in a list belongs to the module that has the list; one of the model itself to the model."""

    class Scaled(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.classifier.scales = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2))])
            self.temperature = torch.nn.Parameter(torch.ones(1))

    model = Scaled.from_pretrained(write_encoder("bert", tmp_path))
    assert unsaved_modules(model, ["pooler"]) == ["", "classifier"]
    del model.temperature
    assert unsaved_modules(model, ["pooler"]) == ["classifier"]
    assert outermost(["a.b", "a", "ab", "c.d.e", "c.d"]) == ["a", "ab", "c.d"]
