"""A model's modules without its weights: from a config, a folder, a file or a hub id."""

import copy
import json

import pytest
import torch
from transformers import AlbertConfig, BertConfig, CLIPVisionConfig, GPT2Config, LlamaConfig, LlavaConfig, T5Config

from flashbone import BoneConfig
from flashbone.errors import ConfigError, FormatError
from flashbone.tuner.model.skeleton import skeleton
from helpers.adapter_folders import tiny_bert, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, lambda: tiny_bert(classifier=False)])
def test_names_shapes_and_ties_are_those_of_the_model(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    bare = skeleton(tmp_path)
    assert type(bare) is type(model)
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert {p.dtype for p in bare.parameters()} == {torch.float32}


def test_a_config_file_and_a_dtype_are_enough(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    bare = skeleton(tmp_path / "config.json", torch.bfloat16)
    assert {p.dtype for p in bare.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LlamaConfig(num_hidden_layers=1), "LlamaForCausalLM"),
        (GPT2Config(n_layer=1), "GPT2LMHeadModel"),
        (BertConfig(num_hidden_layers=1), "BertModel"),
        (T5Config(num_layers=1), "T5Model"),
        (AlbertConfig(), "AlbertModel"),
        (BertConfig(num_hidden_layers=1, architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (LlamaConfig(num_hidden_layers=1, architectures=["OfSomebodyElse"]), "LlamaForCausalLM"),
    ],
)
def test_the_architecture_is_the_configs_or_that_of_its_type(config, name):
    assert type(skeleton(config)).__name__ == name


def _inside(config) -> dict:
    """Every attribute, those of the configs inside it, too."""
    return {name: _inside(v) if hasattr(v, "to_dict") else v for name, v in vars(config).items()}


_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**_SMALL, vocab_size=50),
        BertConfig(**_SMALL, vocab_size=50, architectures=["BertForMaskedLM"]),
        LlavaConfig(
            vision_config=CLIPVisionConfig(**_SMALL, image_size=4, patch_size=2),
            text_config=LlamaConfig(**_SMALL, vocab_size=50),
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_a_config_that_is_passed_stays_as_it_is(config):
    before = copy.deepcopy((config.to_dict(), _inside(config)))
    skeleton(config, torch.float16)
    BoneConfig.recommended(config)
    assert (config.to_dict(), _inside(config)) == before


def _write(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"model_type": "quux"}, ConfigError, "'quux': transformers .* does not know it"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}, ConfigError, "auto_map.*, which is never run"),
        ({}, ConfigError, "names no model_type"),
        ({"model_type": ["llama"]}, ConfigError, "names no model_type"),
        ({"model_type": {}}, ConfigError, "names no model_type"),
        ({"model_type": "llama", "num_attention_heads": 0}, ConfigError, "config.json: ZeroDivisionError: "),
        ({"model_type": "bert", "hidden_act": "nope"}, ConfigError, "config: KeyError: 'nope'"),
        ([], FormatError, "wanted a JSON object"),
    ],
)
def test_a_config_of_no_known_model_is_said_in_one_line(tmp_path, content, error, message):
    with pytest.raises(error, match=message) as caught:
        skeleton(_write(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone/deep/below", "no such folder or file"),
        ("empty", "has no config.json"),
        ("weights.bin", "is a file; a folder with a config.json"),
    ],
)
def test_a_place_without_a_config_is_said_in_one_line(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=message) as caught:
        skeleton(str(tmp_path / source))
    assert "\n" not in str(caught.value)


def test_a_hub_id_that_is_not_in_the_cache_is_said_in_one_line():
    with pytest.raises(
        ConfigError, match="somebody/not-here: no such folder, and not found in the hub's cache"
    ) as caught:
        skeleton("somebody/not-here")
    assert "\n" not in str(caught.value)


def test_of_what_another_library_says_the_first_line_is_said(monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("it cannot be\n  because of the following:\n  much more")

    monkeypatch.setattr("transformers.LlamaForCausalLM._from_config", refuse)
    with pytest.raises(ConfigError, match=r"from the config: it cannot be$"):
        skeleton(LlamaConfig(architectures=["LlamaForCausalLM"]))


def test_sizes_that_no_model_can_have_are_said_in_one_line(tmp_path):
    fields = {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4, "num_hidden_layers": "two"}
    with pytest.raises(ConfigError, match=r"num_hidden_layers|as an integer") as caught:
        skeleton(_write(tmp_path, fields))
    assert "\n" not in str(caught.value)


def test_a_hub_id_in_the_cache_needs_its_config_only(tmp_path, monkeypatch):
    repository = tmp_path / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    tiny_llama().config.save_pretrained(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert type(skeleton("somebody/tiny")).__name__ == "LlamaForCausalLM"
