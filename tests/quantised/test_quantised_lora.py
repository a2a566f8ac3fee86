"""Quantised layers to LoRA: the delta is that of the weight as the layer dequantises it."""

import pytest
import torch
from peft import BoneConfig, convert_to_lora, get_peft_model
from torch import nn

from flashbone import variants
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import close, relative_error
from helpers.quantised import BACKENDS, dequantised, quantised_linear

pytestmark = pytest.mark.beside

OUT, IN, R = 96, 64, 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lora_is_that_of_the_dequantised_weight(backend):
    made = quantised_linear(backend)
    W = None if made.rounds_input else dequantised(made.layer, IN)
    for name in VARIANT_NAMES:
        model = get_peft_model(
            nn.ModuleDict({"q": made.layer}), BoneConfig(r=R, variant=name, mini_r=3, target_modules=["q"])
        )
        block = model.base_model.model["q"].bone_block["default"]
        block.data = random_block(name, OUT, IN, R, dtype=torch.float32)
        want = model.base_model.model["q"].get_delta_weight("default")
        if W is not None:
            assert close(want, variants.get(name).delta(W, block.detach()), torch.float16)
        _, state = model.to_lora(rank=IN)
        A, B = (state[f"base_model.model.q.lora_{part}.weight"] for part in "AB")
        assert close(B @ A, want)
        _, state = convert_to_lora(model, rank=IN)
        A, B = (state[f"base_model.model.q.lora_{part}.weight"] for part in "AB")
        assert relative_error(B @ A, want) < 1e-5
        model.unload()
