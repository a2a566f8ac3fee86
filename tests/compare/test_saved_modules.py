"""Adapters of every method save what a classifier's checkpoint lacked, and are counted as they train."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from flashbone.compare.attaching import attach, count_trained, save_adapter
from flashbone.compare.methods import METHODS
from flashbone.compare.sizes import ParameterCounter
from flashbone.train.models import load_layout
from helpers.comparison import close
from helpers.encoders import write_encoder

IDS = torch.tensor([[1, 5, 6, 7, 2]])


@pytest.mark.parametrize("name", ["bone", "lora"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "xlnet"])
def test_a_methods_adapter_brings_all_that_the_base_lacks(family, name, tmp_path):
    base, method = write_encoder(family, tmp_path / "base"), METHODS[name]
    fields = ({"r": 4}, "all-linear", "SEQ_CLS", {})
    planned, _ = ParameterCounter(load_layout(str(base)), *fields[1:3]).count(method, fields[3], fields[0])
    model = AutoModelForSequenceClassification.from_pretrained(base)
    adapted = attach(model, method, method.config(*fields), 0).eval()
    assert count_trained(adapted, method)[0] == planned.adapter_parameters
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(adapted, tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        assert close(again(input_ids=IDS).logits, adapted(input_ids=IDS).logits, torch.float32)
