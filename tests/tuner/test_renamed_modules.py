"""Adapters of vision models from before transformers 4.52 renamed their modules."""

import pytest
import torch
from peft import BoneConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from helpers.comparison import close
from helpers.mlp import fill_blocks

IDS = torch.tensor([[3, 5, 7, 9]])
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **SMALL}
TEXT = {"vocab_size": 40, **SMALL, "num_key_value_heads": 2}
BEFORE = [
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
]
FLAT = [("model.language_model.", "model."), ("model.visual.", "visual.")]
ROPE = {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}
RENAMED = {  # model type -> its config, and how its names began before transformers 4.52
    "llava": ({"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION}, BEFORE),
    "llava_next": ({"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION}, BEFORE),
    "vipllava": (
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "vision_feature_layers": [-1]},
        BEFORE,
    ),
    "paligemma": (
        {
            "text_config": {"model_type": "gemma", **TEXT, "head_dim": 8},
            "vision_config": {**VISION, "model_type": "siglip_vision_model", "projection_dim": 16},
            "projection_dim": 16,
        },
        BEFORE,
    ),
    "gemma3": (
        {
            "text_config": {"model_type": "gemma3_text", **TEXT, "head_dim": 8},
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        },
        BEFORE,
    ),
    "mistral3": (
        {
            "text_config": {"model_type": "mistral", **TEXT, "head_dim": 8},
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
        },
        BEFORE,
    ),
    "internvl": (
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {**VISION, "model_type": "internvl_vision", "image_size": [8, 8], "patch_size": [4, 4]},
        },
        BEFORE,
    ),
    "qwen2_vl": (
        {
            "text_config": {**TEXT, **ROPE},
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
        },
        FLAT,
    ),
    "qwen2_5_vl": (
        {
            "text_config": {**TEXT, **ROPE},
            "vision_config": {
                "depth": 1, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 24
            },
        },
        FLAT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
@pytest.mark.parametrize("kind", RENAMED)
def test_adapters_from_before_modules_of_vision_models_were_renamed_load(kind, saved, tmp_path):
    fields, names = RENAMED[kind]

    def make() -> nn.Module:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, tie_word_embeddings=False, **fields)
        return AutoModelForImageTextToText.from_config(config).eval()

    targets = r".*language_model.*\.(q_proj|v_proj)"
    config = BoneConfig(r=4, target_modules=targets, modules_to_save=saved, init_weights=False)
    model = get_peft_model(make(), config)
    fill_blocks(model)
    if saved:
        model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(-2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    assert any("model.language_model." in key for key in state)
    old = {}
    for key, tensor in state.items():
        name = key.removeprefix("base_model.model.")
        begin = next(((now, before) for now, before in names if name.startswith(now)), ("", ""))
        old["base_model.model." + begin[1] + name.removeprefix(begin[0])] = tensor
    assert old.keys() != state.keys()
    save_file(old, file)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        assert not close(want, make()(input_ids=IDS).logits)
        assert close(PeftModel.from_pretrained(make(), tmp_path)(input_ids=IDS).logits, want)
