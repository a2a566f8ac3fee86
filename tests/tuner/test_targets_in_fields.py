"""Targets beside the other fields of a config: strings, chosen layers, sizes, later adapters, no targets at all."""

import pytest
import torch
from peft import BoneConfig, LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
from targeted_models import adapted, config
from torch import nn

from flashbone.tuner.model.targets import resolved, roles_of
from helpers.families import FAMILIES


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-attention", 8),
        ("attention.output", 2),
        ("intermediate", 4),
        (r".*\.1\..*q_proj", 1),
        (".*proj", 14),
        ("all-linear", 14),
        ("ALL-LINEAR", 14),
    ],
)
def test_a_string_is_a_role_only_where_it_is_exactly_one(targets, count):
    model = FAMILIES["llama"].make()
    fields = {"target_modules": targets, "task_type": "SEQ_CLS"}
    names = resolved(model, BoneConfig(r=4, **fields))
    assert len(names) == count
    assert adapted(get_peft_model(model, BoneConfig(r=4, **fields))) == names


def test_a_string_that_matches_a_module_as_an_expression_stays_one():
    model = nn.ModuleDict({"output": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)})
    wanted = BoneConfig(r=4, target_modules="output")
    assert resolved(model, wanted) == adapted(get_peft_model(model, wanted)) == ["output"]
    assert wanted.target_modules == "output"


def test_a_string_that_is_a_role_and_the_ending_of_a_layer_means_the_layer():
    wanted = BoneConfig(r=4, target_modules="attention.query")
    assert len(adapted(get_peft_model(FAMILIES["albert"].make(), wanted))) == 1
    assert wanted.target_modules == {"attention.query"}


def test_a_second_adapter_finds_the_layers_of_the_first_and_the_others():
    model = get_peft_model(FAMILIES["bert"].make(), config("attention.output", modules_to_save=["classifier"]), "first")
    model.add_adapter("second", config("output", "mlp.up"))
    model.add_adapter("third", config("encoder"))
    layers = dict(model.base_model.model.named_modules())
    held = {name: [n for n in adapted(model) if name in layers[n].bone_block] for name in model.peft_config}
    expected = FAMILIES["bert"].expected()
    assert set(held["first"]) == expected["attention.output"]
    assert set(held["second"]) == expected["output"] | expected["mlp.up"]
    assert set(held["third"]) == expected["all-attention"] | expected["all-mlp"]
    assert model.peft_config["second"].target_modules == {"output.dense", "intermediate.dense"}
    assert set(resolved(model.base_model.model, config("all-mlp"))) == expected["all-mlp"]
    assert {role: set(names) for role, names in roles_of(model.base_model.model).items()} == expected


def test_a_layer_with_another_methods_adapter_keeps_its_roles():
    model = FAMILIES["llama"].make()
    before = roles_of(model)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert roles_of(model) == before


@pytest.mark.parametrize(
    "fields", [{"layers_to_transform": [1]}, {"layers_to_transform": 1, "layers_pattern": "layer"}]
)
def test_roles_and_containers_go_to_the_chosen_layers_only(fields):
    wanted = config("attention.output", "mlp.down", "attention.self", **fields)
    model = get_peft_model(FAMILIES["bert"].make(), wanted)
    expected = FAMILIES["bert"].expected()
    assert set(adapted(model)) == {n for n in expected["all-attention"] | expected["mlp.down"] if ".1." in n}
    assert wanted.target_modules == {"output.dense", "query", "key", "value"}
    assert resolved(FAMILIES["bert"].make(), wanted) == adapted(model)


def test_excluded_layers_are_left_out_of_roles_and_sizes_are_set_by_name():
    fields = {"exclude_modules": ["0.mlp.up_proj", "o_proj"], "rank_pattern": {"mlp.down_proj": 2}}
    wanted = config("all-mlp", "output", **fields)
    model = get_peft_model(FAMILIES["llama"].make(), wanted)
    layers = dict(model.base_model.model.named_modules())
    assert set(adapted(model)) == FAMILIES["llama"].expected()["all-mlp"] - {"model.layers.0.mlp.up_proj"}
    assert wanted.target_modules == {"up_proj", "gate_proj", "down_proj"}
    sizes = {name: layers[name].bone_r["default"] for name in adapted(model)}
    assert sizes == {name: 2 if name.endswith("down_proj") else 4 for name in adapted(model)}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "modernbert", "clip", "vit"])
def test_no_targets_mean_pefts_table_and_else_all_linear_layers(family):
    model = FAMILIES[family].make()
    known = TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING.get(model.config.model_type)
    names = resolved(model, BoneConfig(r=4))
    if known is None:
        assert names == resolved(model, BoneConfig(r=4, target_modules="all-linear"))
    wanted = BoneConfig(r=4)
    assert adapted(get_peft_model(model, wanted)) == names
    assert known is None or wanted.target_modules == set(known)


def test_models_on_the_meta_device_resolve_and_take_adapters():
    with torch.device("meta"):
        model = FAMILIES["llama"].make()
    assert set(resolved(model, config("all-mlp"))) == FAMILIES["llama"].expected()["all-mlp"]
    model = get_peft_model(model, config("all-mlp"), low_cpu_mem_usage=True)
    assert set(adapted(model)) == FAMILIES["llama"].expected()["all-mlp"]


def test_a_role_as_a_string_goes_with_layers_to_transform():
    wanted = BoneConfig(r=4, target_modules="mlp.down", layers_to_transform=[1])
    model = get_peft_model(FAMILIES["llama"].make(), wanted)
    assert adapted(model) == ["model.layers.1.mlp.down_proj"]
