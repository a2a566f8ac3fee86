"""An adapter's folder in the place of a model: on the base that it names, where that can be had."""

import json

import pytest
import torch
from peft import get_peft_model

from flashbone import BoneConfig, cli
from flashbone.errors import ConfigError
from flashbone.evaluate.bases import base_of, is_adapter
from flashbone.evaluate.loading import load_language_model
from flashbone.evaluate.request import Request, settled
from helpers.comparison import close

IDS = torch.tensor([[7, 8, 9, 10, 11]])


def adapter_of(llama, folder, seed=5, **fields):
    """A random adapter in a folder, which names its base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = BoneConfig(r=8, target_modules=["q_proj", "down_proj"], **fields)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bone_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


def rename_base(adapter, name):
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))


def test_an_adapter_is_evaluated_on_the_base_that_it_names(llama, jsonl, tmp_path, capsys):
    adapter = adapter_of(llama, tmp_path / "a")
    assert (is_adapter(str(adapter)), is_adapter(str(llama)), is_adapter("nobody/nothing")) == (True, False, False)
    request = settled(Request(str(adapter), perplexity=tmp_path))
    assert (request.model, request.adapter) == (str(llama), adapter)
    rows = jsonl([{"text": "the cat sat on the mat"}, {"text": "where was it ?"}])
    assert cli.main(["eval", str(adapter), "--perplexity", str(rows), "--json", "--device", "cpu"]) == 0
    short = json.loads(capsys.readouterr().out)
    assert cli.main(["eval", str(llama), "--adapter", str(adapter), "--perplexity", str(rows), "--json"]) == 0
    long = json.loads(capsys.readouterr().out)
    assert short["evaluations"] == long["evaluations"]
    assert (short["model"], short["adapter"]) == (str(llama), str(adapter))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, "names no base"),
        ("", "names no base"),
        ("no/such-model", "for no/such-model, which is neither a model on this disk"),
        ("/nowhere/at/all", "neither a model on this disk"),
        ("gone.pth", "neither a model on this disk"),
        ("../..", "neither a model on this disk"),
    ],
)
def test_a_base_that_cannot_be_had_is_one_line_with_the_remedy(llama, tmp_path, name, said, capsys):
    adapter = adapter_of(llama, tmp_path / "a")
    rename_base(adapter, name)
    with pytest.raises(ConfigError, match=said):
        base_of(str(adapter))
    capsys.readouterr()
    assert cli.main(["eval", str(adapter), "--perplexity", "x.jsonl"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"MODEL --adapter {adapter}" in line


def test_a_base_in_the_hubs_cache_counts(llama, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    adapter = adapter_of(llama, tmp_path / "a")
    rename_base(adapter, "some/model")
    assert base_of(str(adapter)) == "some/model"


def test_two_adapters_at_once_are_refused_by_eval(llama, tmp_path):
    adapter = adapter_of(llama, tmp_path / "a")
    with pytest.raises(ConfigError, match="is an adapter, and --adapter names another; give the base"):
        settled(Request(str(adapter), adapter=adapter, perplexity=tmp_path))


def test_several_adapters_keep_their_names_and_outputs(llama, tmp_path):
    adapters = {name: adapter_of(llama, tmp_path / name, seed) for seed, name in enumerate(("first", "second"))}
    model, _ = load_language_model(str(llama), adapters, torch.float32, "cpu")
    for name, adapter in adapters.items():
        alone, _ = load_language_model(str(llama), adapter, torch.float32, "cpu")
        model.set_adapter(name)
        with torch.no_grad():
            assert close(model(IDS).logits, alone(IDS).logits)


def test_adapters_of_several_methods_are_refused_by_name(llama, tmp_path):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    bone = adapter_of(llama, tmp_path / "bone")
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=4, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"several methods .*bone \(BONE\), .*lora \(LORA\)"):
        load_language_model(str(llama), {"a": bone, "b": tmp_path / "lora"}, torch.float32, "cpu")
