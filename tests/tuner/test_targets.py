"""Roles, names and containers as targets: which layers they mean, in every family of models."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from targeted_models import Linears, Unknown, adapted, config
from torch import nn

from flashbone.tuner.model.roles import NAMES, ROLES, roles_of_name
from flashbone.tuner.model.targets import resolved, roles_of
from helpers.families import FAMILIES

TRAINED = ("bert", "albert", "modernbert", "gpt2", "gpt-neox", "phi-3", "llama", "mixtral", "t5 with gates", "bart")
TRAINED = (*TRAINED, "rwkv-4")


# Entries that are also a module or a layer of the family, which wins: it holds a part of the role.
CONTAINERS = {
    ("bert with cross-attention", "attention.output"): "bert.encoder.layer.*.attention.output.dense",
    ("mpnet", "output"): "mpnet.encoder.layer.*.output.dense",
    ("rwkv-4", "output"): "rwkv.blocks.*.attention.output",
}


def of_layers(*names: str) -> set[str]:
    return {name.replace("*", layer) for name in names for layer in "01"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_role_of_a_family_is_exactly_these_layers(family):
    model, expected = FAMILIES[family].make(), FAMILIES[family].expected()
    assert {role: set(names) for role, names in roles_of(model).items()} == expected
    for role, names in expected.items():
        names = of_layers(CONTAINERS[family, role]) if (family, role) in CONTAINERS else names
        wanted = config(role)
        assert set(resolved(model, wanted)) == names
        assert wanted.target_modules == {role}
    for role in {"attention.output", "output", "all-attention", "all-mlp"} & expected.keys():
        assert set(adapted(get_peft_model(copy.deepcopy(model), wanted := config(role)))) == set(
            resolved(model, config(role))
        )
        assert set(resolved(model, wanted)) == set(resolved(model, config(role)))  # by the names that it now holds


@pytest.mark.parametrize("family", TRAINED)
def test_an_adapter_put_by_roles_trains_and_the_head_stays(family):
    model = get_peft_model(FAMILIES[family].make(), config("output", "attention.query", init_weights=False))
    tokens = torch.randint(3, 30, (2, 6))
    tokens[:, -1] = 2  # BART classifies at the end of a sentence
    fields = {"decoder_input_ids": tokens} if family.startswith("t5") else {}
    adapters = {f"base_model.model.{name}.bone_block.default" for name in adapted(model)}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(input_ids=tokens, **fields).logits.square().mean().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == adapters
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == adapters


def test_every_name_of_the_table_is_a_layer_of_some_model_of_these_tests():
    models = [family.make() for family in FAMILIES.values()]
    endings = {
        ".".join(["*" if part.isdigit() else part for part in name.split(".")][-n:])
        for model in models
        for name in roles_of(model).get("all-attention", []) + roles_of(model).get("all-mlp", [])
        for n in (1, 2, 3)
    }
    elsewhere = {  # models that are too large to build here, or not of transformers: as their authors name layers
        "attn.qkv": "attention.query attention.key attention.value",  # Qwen2-VL's images, timm
        "attn.proj": "attention.output",
        "mlp.linear_fc1": "mlp.up",  # Qwen3-VL's images
        "mlp.linear_fc2": "mlp.down",
        "ffn.fc1": "mlp.up",  # Florence-2
        "ffn.fc2": "mlp.down",
        "attention.wq": "attention.query",  # Llama as Meta wrote it
        "attention.wk": "attention.key",
        "attention.wv": "attention.value",
        "attention.wo": "attention.output",
        "feed_forward.w1": "mlp.gate",
        "feed_forward.w2": "mlp.down",
        "feed_forward.w3": "mlp.up",
        "att.receptance": "attention.query",  # RWKV as its author wrote it
        "att.key": "attention.key",
        "att.value": "attention.value",
        "att.output": "attention.output",
        "ffn.key": "mlp.up",
        "ffn.receptance": "mlp.gate",
        "ffn.value": "mlp.down",
        "attn.r_proj": "attention.query",  # flash-linear-attention's RWKV-7, and RWKV-6 with what wraps its layers
        "attn.r_proj.linear": "attention.query",
        "attn.k_proj.linear": "attention.key",
        "attn.v_proj.linear": "attention.value",
        "ffn.key.linear": "mlp.up",
        "ffn.receptance.linear": "mlp.gate",
    }
    for gate_of_output in ("blocks.0.att.gate", "layers.0.attn.g_proj.linear"):
        assert roles_of_name(gate_of_output) == []
    assert {name: " ".join(roles_of_name(f"layers.0.{name}")) for name in elsewhere} == elsewhere
    table = set(" ".join(NAMES.values()).split())
    assert table - endings == set(elsewhere)


def test_a_model_that_no_table_knows_is_adapted_by_its_usual_names():
    model, wanted = Unknown(), config("attention.output", "all-mlp")
    trained = get_peft_model(model, wanted)
    mlp = [f"blocks.*.mlp.{name}_proj" for name in ("up", "gate", "down")]
    assert set(adapted(trained)) == of_layers("blocks.*.self_attn.out_proj", *mlp)
    assert wanted.target_modules == {"self_attn.out_proj", "up_proj", "gate_proj", "mlp.down_proj"}
    trained(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


def test_the_output_of_torchs_own_attention_holds_its_role():
    model = nn.ModuleDict({"self_attn": nn.MultiheadAttention(8, 2), "up_proj": nn.Linear(8, 8)})
    assert roles_of(model)["attention.output"] == ["self_attn.out_proj"]
    assert roles_of(model)["mlp.up"] == ["up_proj"]


@pytest.mark.parametrize(
    ("family", "entry", "names"),
    [
        ("albert", "attention.query", ["albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"]),
        ("roberta", "out_proj", ["classifier.out_proj"]),
        ("bert", "output.dense", ["bert.encoder.layer.*.output.dense", "bert.encoder.layer.*.attention.output.dense"]),
    ],
)
def test_a_name_that_a_layer_has_is_kept_as_it_is_written(family, entry, names):
    wanted = config(entry)
    assert set(adapted(get_peft_model(FAMILIES[family].make(), wanted))) == of_layers(*names)
    assert wanted.target_modules == {entry}


def test_a_name_wins_over_a_role_of_the_same_spelling():
    model, wanted = nn.ModuleDict({"mlp": Linears(gate=(8, 2), gate_proj=(8, 8))}), config("mlp.gate")
    assert roles_of(model)["mlp.gate"] == ["mlp.gate_proj"]
    assert adapted(get_peft_model(model, wanted)) == ["mlp.gate"]


def test_names_containers_and_roles_go_together_and_roles_add_no_name_that_is_there():
    wanted = config("q_proj", "all-attention", "layers.1.mlp")
    model = get_peft_model(FAMILIES["llama"].make(), wanted)
    mlp = {f"1.mlp.{name}_proj" for name in ("up", "gate", "down")}
    assert wanted.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"} | mlp
    assert len(adapted(model)) == 2 * 4 + 3


@pytest.mark.parametrize(
    ("family", "entry", "written", "count"),
    [
        ("bert", "attention.output", {"attention.output.dense"}, 2),
        ("bert", "intermediate", {"intermediate.dense"}, 2),
        ("bert", "output", {"output.dense"}, 4),
        ("bert", "layer.1.attention", {f"1.attention.self.{n}" for n in ("query", "key", "value")}
         | {"1.attention.output.dense"}, 4),
        ("roberta", "classifier", {"classifier.dense", "out_proj"}, 2),
        ("gpt2", "attn", {"c_attn", "attn.c_proj"}, 4),
        ("clip", "vision_model.encoder", None, 12),
    ],
)  # fmt: skip
def test_a_module_with_layers_inside_means_every_one_of_them(family, entry, written, count):
    wanted = config(entry)
    model = get_peft_model(FAMILIES[family].make(), wanted)
    assert len(adapted(model)) == count
    assert all(f".{entry}." in f".{name}" for name in adapted(model))
    assert written is None or wanted.target_modules == written


def test_a_container_leaves_out_what_is_trained_as_a_whole():
    wanted = config("blocks.0", modules_to_save=["blocks.0.mlp"])
    model = get_peft_model(Unknown(), wanted)
    attention = {f"blocks.0.self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
    assert set(adapted(model)) == attention | {"blocks.0.router"}
    assert sum("modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad) == 6


@pytest.mark.parametrize("entry", ["mlp.down", "output", "all-attention", "layer.1.output"])
def test_a_saved_config_names_the_layers_and_loads_on_the_same_ones(entry, tmp_path):
    model = get_peft_model(FAMILIES["bert"].make(), config(entry))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert not set(saved) & {*ROLES, entry}
    again = PeftModel.from_pretrained(FAMILIES["bert"].make(), tmp_path)
    assert adapted(again) == adapted(model)
    assert set(again.peft_config["default"].target_modules) == set(saved)


def test_where_one_name_has_two_roles_the_saved_names_tell_them_apart():
    wanted = config("mlp.down")
    get_peft_model(FAMILIES["bert"].make(), wanted)
    assert wanted.target_modules == {"0.output.dense", "1.output.dense"}
    wanted = config("mlp.down")
    get_peft_model(FAMILIES["gpt2"].make(), wanted)
    assert wanted.target_modules == {"mlp.c_proj"}
