"""The published settings of the orthogonal variant, by the size of the model."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig

from flashbone import BoneConfig
from flashbone.errors import ConfigError
from flashbone.tuner.model.presets import parameter_count
from helpers.adapter_folders import tiny_bert, tiny_llama


def model_of(parameters: int) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(parameters, device="meta"))
    return module


LLAMA_2_13B = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        (1, (32, 0.1, 1e-6)),
        (99_999_999, (32, 0.1, 1e-6)),
        (100_000_000, (64, 0.15, 1e-6)),
        (999_999_999, (64, 0.15, 1e-6)),
        (1_000_000_000, (128, 0.2, 1e-5)),
        (6_999_999_999, (128, 0.2, 1e-5)),
        (7_000_000_000, (256, 0.25, 1e-5)),
        (13_000_000_000, (256, 0.25, 1e-5)),
    ],
)
def test_each_size_has_its_published_setting(parameters, wanted):
    config = BoneConfig.recommended(model_of(parameters))
    assert (config.r, config.dropout, config.orthogonal_eps) == wanted
    assert (config.variant, config.use_orthogonal) == ("orthogonal", True)


def test_llama_2_13b_counts_as_13b():
    assert parameter_count(LLAMA_2_13B) == 13_015_864_320
    assert BoneConfig.recommended(LLAMA_2_13B).r == 256


def test_above_13b_the_size_and_another_way_are_named():
    with pytest.raises(ConfigError, match=r"70B parameters.*end at 13B; use BoneConfig\(r=64, variant=\"bone\"\)"):
        BoneConfig.recommended(model_of(70_000_000_000))
    assert BoneConfig.recommended(model_of(70_000_000_000), r=64, variant="bone").variant == "bone"


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"dropout": 0.0}, {"variant": "orthogonal", "r": 32, "dropout": 0.0, "orthogonal_eps": 1e-6}),
        ({"r": 16}, {"variant": "orthogonal", "r": 16, "dropout": 0.1}),
        ({"bottleneck_size": 8}, {"variant": "orthogonal", "r": 8, "dropout": 0.1}),
        ({"variant": "orthogonal"}, {"variant": "orthogonal", "r": 32, "dropout": 0.1}),
        ({"use_orthogonal": False}, {"variant": "orthogonal", "r": 32, "use_orthogonal": False}),
        ({"orthogonal_eps": 1e-4}, {"orthogonal_eps": 1e-4, "r": 32}),
        ({"variant": "bone"}, {"variant": "bone", "r": 64, "dropout": 0.0, "bottleneck_size": None}),
        ({"variant": "bat-row", "r": 8}, {"variant": "bat-row", "r": 8, "dropout": 0.0}),
        ({"init_weights": "bat"}, {"variant": "bat-col", "r": 64}),
        ({"bottleneck_size": None}, {"variant": "orthogonal", "r": 32, "dropout": 0.1}),
        ({"r": None, "variant": None, "init_weights": None}, {"variant": "orthogonal", "r": 32, "dropout": 0.1}),
        ({"target_modules": ["q_proj"], "bias": "all"}, {"target_modules": {"q_proj"}, "bias": "all", "r": 32}),
    ],
)
def test_overrides_win(overrides, wanted):
    config = BoneConfig.recommended(model_of(1000), **overrides)
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_overrides_are_checked_as_ever():
    with pytest.raises(ConfigError, match="dropout"):
        BoneConfig.recommended(model_of(1000), dropout=2)
    with pytest.raises(TypeError, match="unknown"):
        BoneConfig.recommended(model_of(1000), unknown=1)


@pytest.mark.parametrize("model", [5, None, {"model_type": "llama"}])
def test_what_is_no_model_is_said(model):
    with pytest.raises(ConfigError, match="wanted a model, its config, its folder, or a hub id"):
        BoneConfig.recommended(model)


def test_a_model_a_config_and_a_folder_give_the_same(tmp_path):
    model = tiny_bert()
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(tmp_path)
    counts = {parameter_count(source) for source in (model, model.config, tmp_path, str(tmp_path / "config.json"))}
    assert counts == {model.num_parameters()}


def test_tied_weights_count_once():
    tied, free = tiny_llama(tie_word_embeddings=True), tiny_llama()
    assert parameter_count(free) - parameter_count(tied) == free.lm_head.weight.numel()


@pytest.mark.parametrize(
    "config",
    [
        BoneConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], use_dora=True, modules_to_save=["lm_head"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda config: type(config).__name__,
)
def test_of_an_adapted_model_the_base_counts(config):
    model = tiny_llama()
    before = model.num_parameters()
    adapted = get_peft_model(model, config)
    assert parameter_count(adapted) == before
    assert sum(p.numel() for p in adapted.parameters()) > before


def test_packed_and_partitioned_weights_count_as_what_they_stand_for():
    class Params4bit(nn.Parameter):
        pass

    module = nn.Module()
    module.packed = Params4bit(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    module.not_packed_yet = Params4bit(torch.zeros(8, 1), requires_grad=False)
    module.not_packed_yet.bnb_quantized = False
    module.partitioned = nn.Parameter(torch.empty(0))
    module.partitioned.ds_numel = 100
    assert parameter_count(module) == 16 + 8 + 100


def test_the_recommended_adapter_can_be_attached():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = tiny_llama().__class__(config)
    adapted = get_peft_model(model, BoneConfig.recommended(model, target_modules="all-linear"))
    assert adapted.get_nb_trainable_parameters()[0] == 7 * 32 * 32
