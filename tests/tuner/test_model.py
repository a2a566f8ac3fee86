"""Adapters in a model: added, switched, saved, loaded and deleted, on small models and real ones."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from adapted_models import SIZES, adapted, config, inputs, snapshot
from peft import BoneConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from helpers import reference
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import MLP, fill_blocks


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_new_adapter_changes_nothing_and_only_it_is_trained(variant):
    base = MLP(SIZES)
    want = base(inputs())
    model = get_peft_model(base, config(variant))
    if variant == "bat-col":  # a product with a shifted weight of its own, whose strides are others
        assert close(model(inputs()), want)
    else:
        assert same_bits(model(inputs()), want, Promise.EXACT)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"base_model.model.lin{i}.bone_block.default" for i in (0, 1)
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(15):
        loss = (model(inputs()) - 1).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_adapters_of_different_variants_are_set_disabled_and_deleted():
    model = adapted("bat-col", "bone", "bat-row", "mini")
    base = MLP(SIZES)(inputs())
    outputs = {}
    for name in "0123":
        model.set_adapter(name)
        outputs[name] = model(inputs())
    assert all(not torch.allclose(a, b) for a in outputs.values() for b in [base, *outputs.values()] if a is not b)
    with model.disable_adapter():
        assert same_bits(model(inputs()), base, Promise.SAME_PRODUCT)
    assert same_bits(model(inputs()), outputs["3"], Promise.SAME_PRODUCT)
    model.set_adapter("1")
    model.delete_adapter("2")
    assert set(model.peft_config) == {"0", "1", "3"}
    assert "2" not in model.base_model.model.lin0.bone_r
    assert same_bits(model(inputs()), outputs["1"], Promise.SAME_PRODUCT)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("2")


def test_several_active_adapters_add_up_in_any_order():
    model = adapted("bat-col", "bone", "bat-row")
    first, second = MLP(SIZES), model.base_model.model
    for layer, wanted in ((second.lin0, first.lin0), (second.lin1, first.lin1)):
        blocks = [(layer.bone_variant[n].name, layer.bone_block[n].detach()) for n in "012"]
        wanted.weight.data = wanted.weight + sum(reference.delta(v, wanted.weight, b) for v, b in blocks)
    want = first(inputs())
    for order in (["0", "1", "2"], ["2", "0", "1"]):
        model.base_model.set_adapter(order)
        assert close(model(inputs()), want)
        model.merge_adapter()
        assert close(model(inputs()), want)
        model.unmerge_adapter()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_saved_adapters_load_again(variant, low_cpu_mem_usage, tmp_path):
    model = adapted(variant, "bone")
    want = model(inputs())
    model.save_pretrained(tmp_path, selected_adapters=["0"])
    folder = tmp_path / "0"
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["variant"], saved["r"]) == ("BONE", variant, 4)
    assert saved["init_weights"] == ("bat" if variant == "bat-col" else True)
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        f"base_model.model.lin{i}.bone_block" for i in (0, 1)
    }
    again = PeftModel.from_pretrained(MLP(SIZES), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    stored, held = get_peft_model_state_dict(model, adapter_name="0"), get_peft_model_state_dict(again)
    assert held.keys() == stored.keys()
    assert all(same_bits(held[name], stored[name], Promise.STORED) for name in stored)
    assert close(again(inputs()), want)  # with low_cpu_mem_usage blocks stay in the file's memory, however aligned
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(folder, "reloaded", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    again.set_adapter("reloaded")
    assert close(again(inputs()), want)
    again.load_adapter(folder, "reloaded")
    assert close(again(inputs()), want)


def test_configs_survive_a_round_trip_and_deepcopy(tmp_path):
    fields = {"variant": "bat-col", "dropout": 0.1, "rank_pattern": {"lin1": 2}, "bias": "bone_only", "r": 3}
    before = config(**fields)
    before.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, BoneConfig)
    assert again.to_dict() == before.to_dict() == copy.deepcopy(again).to_dict()
    assert str(again.peft_type.value) == "BONE"


def test_rank_pattern_sets_single_block_sizes():
    model = get_peft_model(MLP(SIZES), config(rank_pattern={"lin1": 2}))
    inner = model.base_model.model
    assert (inner.lin0.bone_r, inner.lin1.bone_r) == ({"default": 4}, {"default": 2})
    assert inner.lin1.bone_block["default"].shape == (2, SIZES[2])


@pytest.mark.parametrize("bias", ["all", "bone_only"])
def test_biases_are_trained_saved_and_loaded(bias, tmp_path):
    model = get_peft_model(MLP(SIZES), config(bias=bias, target_modules=["lin0"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert trained == {"base_model.model.lin0.base_layer.bias"} | (
        {"base_model.model.lin1.bias"} if bias == "all" else set()
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    model.save_pretrained(tmp_path)
    assert same_bits(PeftModel.from_pretrained(MLP(SIZES), tmp_path)(inputs()), model(inputs()), Promise.SAME_PRODUCT)


@pytest.mark.parametrize("bias", ["none", "all", "bone_only"])
def test_modules_to_save_are_trained_saved_and_loaded(bias, tmp_path):
    model = get_peft_model(MLP(SIZES), config(target_modules=["lin0"], modules_to_save=["lin1"], bias=bias))
    fill_blocks(model)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            assert parameter.requires_grad
            parameter.data.mul_(2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MLP(SIZES), tmp_path)
    assert same_bits(again(inputs()), model(inputs()), Promise.SAME_PRODUCT)
    assert close(again.merge_and_unload()(inputs()), model(inputs()))


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_layers_without_adapters_are_left_alone_and_unload_gives_the_base_back(variant):
    base = MLP(SIZES)
    before = snapshot(base)
    model = get_peft_model(base, config(variant, target_modules=["lin1"]))
    fill_blocks(model)
    assert type(model.base_model.model.lin0) is nn.Linear
    unloaded = model.unload()
    assert [repr(type(m)) for m in unloaded.modules()] == before[2]
    assert all(same_bits(v, before[0][k], Promise.UNTOUCHED) for k, v in unloaded.state_dict().items())


def test_injection_without_peft_model_saves_and_loads():
    model = inject_adapter_in_model(config("bat-row"), MLP(SIZES))
    fill_blocks(model)
    state = get_peft_model_state_dict(model)
    assert set(state) == {"lin0.bone_block", "lin1.bone_block"}
    again = inject_adapter_in_model(config("bat-row"), MLP(SIZES))
    set_peft_model_state_dict(again, state)
    assert same_bits(again(inputs()), model(inputs()), Promise.SAME_PRODUCT)


# ---- real architectures


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=32)).eval()


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_gpt2_with_its_default_targets_and_conv1d_layers(variant, tmp_path):
    tokens = torch.arange(12).view(2, 6)
    model = get_peft_model(gpt2(), BoneConfig(r=8, variant=variant, mini_r=4))
    assert {n.rpartition(".")[2] for n in model.base_model.targeted_module_names} == {"c_attn"}
    fill_blocks(model)
    want = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(gpt2(), tmp_path)
    assert same_bits(again(tokens).logits, want, Promise.SAME_PRODUCT)
    assert close(again.merge_and_unload()(tokens).logits, want, torch.float32)
    assert not torch.allclose(want, gpt2()(tokens).logits)


def test_a_container_can_be_saved_with_the_adapter_and_unloaded():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    base = BertModel(BertConfig(vocab_size=31, **sizes)).eval()
    tokens = torch.arange(8).view(1, 8)
    model = get_peft_model(base, BoneConfig(r=4, target_modules=["query", "dense"], modules_to_save=["pooler"]))
    fill_blocks(model)
    want = model(tokens).pooler_output
    assert close(model.merge_and_unload()(tokens).pooler_output, want)


def test_an_unknown_model_type_defaults_to_all_linear_layers():
    model = get_peft_model(MLP(SIZES), BoneConfig(r=4))
    assert set(model.base_model.targeted_module_names) == {"lin0", "lin1"}


RXN = find_spec("rxnmapper")


@pytest.mark.skipif(RXN is None, reason="rxnmapper, which ships a small pretrained ALBERT, is not installed")
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_real_pretrained_albert_with_shared_layers(variant, tmp_path):
    from transformers import AlbertForMaskedLM

    checkpoint = Path(RXN.submodule_search_locations[0]) / "models/transformers/albert_heads_8_uspto_all_1310k"
    base = AlbertForMaskedLM.from_pretrained(checkpoint).eval()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    tokens = torch.arange(20, 36).view(2, 8)
    plain = base(tokens).logits
    model = get_peft_model(base, BoneConfig(r=32, variant=variant, mini_r=8, target_modules="all-linear"))
    fill_blocks(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.02)
    want = model(tokens).logits
    assert not torch.allclose(want, plain, atol=1e-3)
    model.merge_adapter()
    assert close(model(tokens).logits, want, torch.float32)
    model.unmerge_adapter()
    assert same_bits(model(tokens).logits, want, Promise.SAME_PRODUCT)
    model.save_pretrained(tmp_path)
    unloaded = model.unload()
    assert all(same_bits(v, before[k], Promise.UNTOUCHED) for k, v in unloaded.state_dict().items())
    assert same_bits(PeftModel.from_pretrained(unloaded, tmp_path)(tokens).logits, want, Promise.SAME_PRODUCT)


def test_bat_col_and_bat_row_are_not_confused_on_square_layers(tmp_path):
    sizes = (8, 8, 8)
    outputs = {}
    for variant in ("bat-col", "bat-row"):
        model = get_peft_model(MLP(sizes), config(variant))
        fill_blocks(model)
        model.save_pretrained(tmp_path / variant)
        outputs[variant] = model(inputs()[:, :8])
    assert not torch.allclose(outputs["bat-col"], outputs["bat-row"])
    for variant, want in outputs.items():
        again = PeftModel.from_pretrained(MLP(sizes), tmp_path / variant)
        assert same_bits(again(inputs()[:, :8]), want, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_on_fewer_layers_loads_beside_another(low_cpu_mem_usage, tmp_path):
    model = adapted("bone")
    other = get_peft_model(MLP(SIZES), config("mini", target_modules=["lin0"]), adapter_name="other")
    fill_blocks(other)
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("other")
    stored, held = (get_peft_model_state_dict(m, adapter_name="other") for m in (other, model))
    assert held.keys() == stored.keys()
    assert all(same_bits(held[name], stored[name], Promise.STORED) for name in stored)
    assert close(model(inputs()), other(inputs()))  # with low_cpu_mem_usage blocks stay in the file's memory
