"""What PEFT's users do with a model: add, switch, disable, delete, save, load, combine, merge; what fails cleanly."""

import copy
import json
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import BoneConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from flashbone.errors import ConfigError, FlashboneError, NonFiniteError, ShapeError
from flashbone.ops import reference
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import close
from helpers.mlp import MLP, fill_blocks

SIZES = (13, 9, 6)


def inputs(n: int = 3) -> torch.Tensor:
    return torch.randn(n, SIZES[0], dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def config(variant: str = "bone", r: int = 4, **fields) -> BoneConfig:
    return BoneConfig(**{"r": r, "variant": variant, "mini_r": 2, "target_modules": ["lin0", "lin1"]} | fields)


def adapted(*variants: str, **fields) -> PeftModel:
    """An MLP with one filled adapter for each variant, named by its position; the first is active."""
    model = get_peft_model(MLP(SIZES), config(variants[0], **fields), adapter_name="0")
    for i, variant in enumerate(variants[1:], 1):
        model.add_adapter(str(i), config(variant, r=4 - i))
    fill_blocks(model)
    return model


def snapshot(model: nn.Module) -> tuple[dict, dict, list[str]]:
    """Values, trainability and module types of a model."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, {n: p.requires_grad for n, p in model.named_parameters()}, [repr(type(m)) for m in model.modules()]


def assert_unchanged(model: nn.Module, before: tuple[dict, dict, list[str]]) -> None:
    state, trainable, kinds = snapshot(model)
    assert state.keys() == before[0].keys()
    assert all(torch.allclose(state[k], before[0][k], rtol=0, atol=0, equal_nan=True) for k in state)
    assert trainable == before[1]
    assert kinds == before[2]


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_new_adapter_changes_nothing_and_only_it_is_trained(variant):
    base = MLP(SIZES)
    want = base(inputs())
    model = get_peft_model(base, config(variant))
    assert torch.equal(model(inputs()), want)
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
        assert torch.equal(model(inputs()), base)
    assert torch.equal(model(inputs()), outputs["3"])
    model.set_adapter("1")
    model.delete_adapter("2")
    assert set(model.peft_config) == {"0", "1", "3"}
    assert "2" not in model.base_model.model.lin0.bone_r
    assert torch.equal(model(inputs()), outputs["1"])
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
    assert torch.equal(again(inputs()), want)
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(folder, "reloaded", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    again.set_adapter("reloaded")
    assert torch.equal(again(inputs()), want)
    again.load_adapter(folder, "reloaded")
    assert torch.equal(again(inputs()), want)


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
    assert torch.equal(PeftModel.from_pretrained(MLP(SIZES), tmp_path)(inputs()), model(inputs()))


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
    assert torch.equal(again(inputs()), model(inputs()))
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
    assert all(torch.equal(v, before[0][k]) for k, v in unloaded.state_dict().items())


def test_injection_without_peft_model_saves_and_loads():
    model = inject_adapter_in_model(config("bat-row"), MLP(SIZES))
    fill_blocks(model)
    state = get_peft_model_state_dict(model)
    assert set(state) == {"lin0.bone_block", "lin1.bone_block"}
    again = inject_adapter_in_model(config("bat-row"), MLP(SIZES))
    set_peft_model_state_dict(again, state)
    assert torch.equal(again(inputs()), model(inputs()))


# ---- weighted sums


@pytest.mark.parametrize(
    "kinds", [*((v, v) for v in VARIANT_NAMES if v != "orthogonal"), ("bone", "mini"), ("bone", "bone", "mini")]
)
def test_weighted_adapters_are_exact_sums(kinds):
    model = get_peft_model(MLP(SIZES), config(kinds[0]), adapter_name="0")
    for i, variant in enumerate(kinds[1:], 1):
        r = 4 if variant.startswith("bat") else 4 - i
        model.add_adapter(str(i), config(variant, r=r))
    fill_blocks(model)
    model.base_model.set_scale("0", 0.5)
    names, weights = [str(i) for i in range(len(kinds))], [0.7, -1.3, 0.4][: len(kinds)]
    model.add_weighted_adapter(names, weights, "sum")
    assert model.active_adapter == "0"
    for layer in (model.base_model.model.lin0, model.base_model.model.lin1):
        want = sum(w * layer.get_delta_weight(n) for n, w in zip(names, weights, strict=True))
        assert close(layer.get_delta_weight("sum"), want)
    model.set_adapter("sum")
    got = model(inputs())
    for name, weight in zip(names, weights, strict=True):
        model.base_model.set_scale(name, weight * (0.5 if name == "0" else 1))
    model.base_model.set_adapter(names)
    assert close(got, model(inputs()))


def test_weighted_adapters_of_other_layers_and_their_files(tmp_path):
    model = get_peft_model(MLP(SIZES), config(target_modules=["lin0"]), adapter_name="0")
    model.add_adapter("1", config(r=3, target_modules=["lin0", "lin1"], rank_pattern={"lin1": 2}))
    fill_blocks(model)
    model.add_weighted_adapter(["0", "1"], [1.0, 2.0], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(MLP(SIZES), tmp_path / "sum")
    assert torch.equal(again(inputs()), model(inputs()))
    assert again.base_model.model.lin0.bone_r == {"default": 12}


@pytest.mark.parametrize(
    ("kinds", "arguments", "message"),
    [
        (
            ("bat-col", "bat-col"),
            (["0", "1"], [1, 1], "s"),
            r"lin0: '0' is bat-col with r=4, '1' is bat-col with r=3; no",
        ),
        (
            ("orthogonal",) * 2,
            (["0", "1"], [1, 1], "s"),
            "'0' is orthogonal with r=4, .*; no single adapter is their sum",
        ),
        (("bone", "bat-row"), (["0", "1"], [1, 1], "s"), "no single adapter is their sum; activate them together"),
        (("bone", "bone"), (["0", "9"], [1, 1], "s"), r"adapters: no \['9'\] in this model, which has \['0', '1'\]"),
        (("bone", "bone"), (["0", "1"], [1], "s"), "weights: got 1 for 2 adapters"),
        (("bone", "bone"), (["0", "1"], [1, 1], "1"), "adapter_name: '1' exists already"),
        (("bone", "bone"), (["0", "1"], [1, 1], "s", "svd"), "combination_type: got 'svd', wanted 'linear'"),
        (("bone", "bone"), ([], [], "s"), "wanted one or more different names"),
    ],
)
def test_weighted_sums_that_do_not_exist_are_refused_and_change_nothing(kinds, arguments, message):
    model = adapted(*kinds)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(*arguments)
    assert_unchanged(model, before)
    assert set(model.peft_config) == {"0", "1"}


# ---- merging


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_safe_merge_that_fails_in_the_last_layer_leaves_every_layer_alone(variant):
    model = adapted(variant)
    model.base_model.model.lin1.bone_block["0"].data.flatten()[0] = float("nan")
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NonFiniteError, match=r"lin1: adapter '0': the merged weight would hold \d+ values"):
            merge(safe_merge=True)
        assert_unchanged(model, before)
    assert not model.base_model.model.lin0.merged


def test_merging_an_adapter_that_does_not_exist_is_refused():
    model = adapted("bone")
    with pytest.raises(ConfigError, match=r"no \['typo'\] in this model, which has \['0'\]"):
        model.merge_adapter(["typo"])


def test_switching_while_merged_unmerges_first_and_deleting_is_refused():
    model = adapted("bat-col", "bone")
    want = model(inputs())
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("0")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("1")
    model.set_adapter("0")
    assert torch.equal(model(inputs()), want)


def test_disabling_while_merged_gives_the_base_and_originals_can_be_dropped():
    model = adapted("bone")
    base = MLP(SIZES)(inputs())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(inputs()), base)
    model.base_model.keep_originals(False)
    model.merge_adapter()
    assert model.base_model.model.lin0._original_weight is None
    model.unmerge_adapter()
    assert close(model.base_model.model.lin0.base_layer.weight.detach(), MLP(SIZES).lin0.weight.detach())


def test_merge_and_unload_of_chosen_adapters_equals_their_sum():
    model = adapted("bat-col", "bone", "bat-row")
    model.base_model.set_adapter(["0", "2"])
    want = model(inputs())
    merged = model.merge_and_unload(adapter_names=["2", "0"])
    assert type(merged.lin0) is nn.Linear
    assert close(merged(inputs()), want)


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
    assert torch.equal(again(tokens).logits, want)
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
    assert torch.equal(model(tokens).logits, want)
    model.save_pretrained(tmp_path)
    unloaded = model.unload()
    assert all(torch.equal(v, before[k]) for k, v in unloaded.state_dict().items())
    assert torch.equal(PeftModel.from_pretrained(unloaded, tmp_path)(tokens).logits, want)


# ---- bad input


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"r": 0}, ["`r` should be a positive integer value but the value passed is 0"]),
        ({"r": 2.5}, ["`r` should be a positive integer value but the value passed is 2.5"]),
        ({"variant": "bat"}, ["variant: got 'bat', wanted one of 'bone', 'mini', 'bat-col', 'bat-row'"]),
        ({"init_weights": "mini"}, ["init_weights: got 'mini'", "variants are chosen by `variant`"]),
        ({"init_weights": "bat", "variant": "bat-row"}, ["means variant='bat-col', but variant='bat-row'"]),
        ({"dropout": 1.0, "bias": "some"}, ["dropout: got 1.0, wanted a probability in", "bias: got 'some'"]),
        ({"rank_pattern": {"lin1": 0}}, ["rank_pattern['lin1']"]),
        ({"rank_pattern": ["lin1"], "variant": ["bone"]}, ["rank_pattern: got ['lin1']", "variant: got ['bone']"]),
        ({"target_modules": "lin.*", "layers_to_transform": 1}, ["`layers_to_transform` cannot be used"]),
    ],
)
def test_contradictory_configurations_are_refused_with_every_reason(fields, messages):
    with pytest.raises(ConfigError) as raised:
        config(**fields)
    assert isinstance(raised.value, ValueError)
    assert "\n" not in str(raised.value)
    for message in messages:
        assert message in str(raised.value)


def test_unknown_config_fields_are_errors():
    with pytest.raises(TypeError, match="rr"):
        config(rr=3)


class Mixed(nn.Module):
    """Layers that can be adapted, and after them one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.embed = nn.Linear(8, 8), nn.Linear(8, 8), nn.EmbeddingBag(5, 8)
        self.k_proj.requires_grad_(False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj", "embed"]}, "embed: target module cannot be adapted, it is an EmbeddingBag"),
        ({"target_modules": ["q_porj"]}, r"q_porj.* not found .* Linear layers of this model end in: q_proj, k_proj\."),
        ({"target_modules": "nothing"}, "Linear layers of this model end in: q_proj, k_proj"),
        ({"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["q_proj"]}, "only targeted modules"),
    ],
)
@pytest.mark.parametrize("second", [False, True])
def test_an_injection_that_fails_leaves_the_model_as_it_was(fields, message, second):
    model = Mixed()
    if second:
        model = get_peft_model(model, BoneConfig(r=2, target_modules=["k_proj"]), adapter_name="first")
    before = snapshot(model)
    add = partial(model.add_adapter, "second") if second else partial(get_peft_model, model)
    with pytest.raises(ValueError, match=message) as raised:
        add(BoneConfig(r=2, **fields))
    assert isinstance(raised.value, FlashboneError)
    assert_unchanged(model, before)
    if second:
        assert set(model.peft_config) == {"first"}
        assert model.base_model.model.k_proj.active_adapters == ["first"]


def broken(folder: Path, change) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return folder


def corrupt(folder: Path) -> Path:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    return folder


def drop(tensors):
    del tensors["base_model.model.lin1.bone_block"]


def resize(tensors):
    for key in tensors:
        tensors[key] = tensors[key][:2]


def rename(tensors):
    tensors["base_model.model.lin7.bone_block"] = tensors.pop("base_model.model.lin0.bone_block")


MISFITS = [
    (drop, ["lin1: the checkpoint has no block for it"]),
    (resize, ["lin0: bone adapter has a block of shape (4, 9) but the checkpoint holds (2, 9); was r", "lin1: bone"]),
    (rename, ["lin7.bone_block: the model has no such tensor", "lin0: the checkpoint has no block"]),
]


@pytest.mark.parametrize(("change", "messages"), MISFITS)
@pytest.mark.parametrize("trainable", [False, True])
def test_loading_an_adapter_that_does_not_fit_leaves_the_base_as_it_was(change, messages, trainable, tmp_path):
    adapted("bone").save_pretrained(tmp_path)
    base = MLP(SIZES)
    base.lin1.bias.requires_grad = False
    before = snapshot(base)
    with pytest.raises(ShapeError) as raised:
        PeftModel.from_pretrained(base, broken(tmp_path / "0", change), is_trainable=trainable)
    for message in messages:
        assert message in str(raised.value)
    assert_unchanged(base, before)


@pytest.mark.parametrize(("change", "messages"), MISFITS)
def test_loading_into_an_adapted_model_that_does_not_fit_changes_nothing(change, messages, tmp_path):
    adapted("bone").save_pretrained(tmp_path)
    folder = broken(tmp_path / "0", change)
    model = adapted("bone", "bat-col")
    before = snapshot(model)
    for name in ("new", "0"):
        with pytest.raises(ShapeError) as raised:
            model.load_adapter(folder, name)
        assert all(message in str(raised.value) for message in messages)
        assert_unchanged(model, before)
        assert set(model.peft_config) == {"0", "1"}


def spoil_saved_module(tensors):
    tensors["base_model.model.lin1.weight"] = tensors["base_model.model.lin1.weight"][:2]


def spoil_bias(tensors):
    tensors["base_model.model.lin1.bias"] = tensors["base_model.model.lin1.bias"][:2]


def drop_saved_module(tensors):
    del tensors["base_model.model.lin1.weight"]


def add_stranger(tensors):
    tensors["base_model.model.lin9.weight"] = torch.ones(2, 2)


OTHER_MISFITS = [
    ({"modules_to_save": ["lin1"]}, spoil_saved_module, r"lin1.*: the model has a tensor of shape \(6, 9\) but the"),
    ({"modules_to_save": ["lin1"]}, drop_saved_module, r"its weights lack .*lin1.weight"),
    ({"modules_to_save": ["lin1"]}, add_stranger, "lin9.weight: the model has no such tensor"),
    ({"bias": "all"}, spoil_bias, r"lin1.bias: the model has a tensor of shape \(6,\)"),
    ({}, add_stranger, "lin9.weight: the model has no such tensor"),
    ({}, None, "its weights cannot be read: .* is the file whole"),
]


@pytest.mark.parametrize(("fields", "change", "message"), OTHER_MISFITS)
def test_loading_anything_that_does_not_fit_or_is_corrupt_leaves_no_trace(fields, change, message, tmp_path):
    model = adapted("bone", target_modules=["lin0"], **fields)
    model.save_pretrained(tmp_path)
    folder = broken(tmp_path / "0", change) if change else corrupt(tmp_path / "0")
    base = MLP(SIZES)
    before = snapshot(base)
    with pytest.raises(FlashboneError, match=message):
        PeftModel.from_pretrained(base, folder, is_trainable=True)
    assert_unchanged(base, before)
    assert not hasattr(base, "peft_config")
    if "bias" in fields:  # PEFT takes one adapter with biases at most
        return
    before, want = snapshot(model), model(inputs())
    with pytest.raises(FlashboneError, match=message):
        model.load_adapter(folder, "new")
    assert_unchanged(model, before)
    assert set(model.peft_config) == {"0"}
    assert torch.equal(model(inputs()), want)
    model(inputs()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_failed_load_never_deletes_a_trained_adapter_nor_a_standing_merge(tmp_path):
    adapted("bone").save_pretrained(tmp_path)
    settings = BoneConfig.from_pretrained(tmp_path / "0")
    model = get_peft_model(MLP(SIZES), settings)
    fill_blocks(model)
    model.merge_adapter()
    before = snapshot(model)
    folder = broken(tmp_path / "0", resize)
    for name in ("default", "new"):
        load = partial(model.load_adapter, folder, name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Adapter cannot be set when the model is merged")  # it is merged again
            with pytest.raises(ShapeError, match="adapter has a block of shape"):
                load()
        assert_unchanged(model, before)
        assert model.base_model.model.lin0.merged_adapters == ["default"]


def test_mismatched_sizes_are_ignored_where_asked_for(tmp_path):
    adapted("bone").save_pretrained(tmp_path)
    model = adapted("bone")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        model.load_adapter(broken(tmp_path / "0", resize), "0", ignore_mismatched_sizes=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_loading_other_methods_is_as_it_was_without_flashbone(tmp_path):
    lora = LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False)
    model = get_peft_model(MLP(SIZES), lora)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MLP(SIZES), tmp_path)
    again.load_adapter(tmp_path, "second")
    assert torch.equal(again(inputs()), model(inputs()))
    before = snapshot(again)
    with pytest.raises(RuntimeError, match="Error\\(s\\) in loading state_dict") as raised:
        again.load_adapter(lora_of_another_size(tmp_path), "default")
    assert not isinstance(raised.value, FlashboneError)
    assert_unchanged(again, before)


def lora_of_another_size(folder: Path) -> Path:
    return broken(folder, lambda tensors: tensors.update({k: torch.cat([v, v]) for k, v in tensors.items()}))


def test_a_failed_injection_leaves_no_config_behind():
    model = inject_adapter_in_model(config(), MLP(SIZES), "a")
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(ConfigError, match="not found in the base model"),
    ):
        inject_adapter_in_model(config(target_modules=["typo"]), model, "b")
    assert set(model.peft_config) == {"a"}


def test_weights_shared_by_two_adapted_layers_are_not_merged():
    base = MLP((8, 8, 8))
    base.lin1.weight = base.lin0.weight
    model = get_peft_model(base, config())
    fill_blocks(model)
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match="lin0 and lin1 share one weight and are both adapted"):
            merge()
        assert_unchanged(model, before)


def test_a_merge_that_could_not_be_taken_back_touches_no_layer():
    model = get_peft_model(MLP(SIZES), config("bat-col"), adapter_name="0")
    model.add_adapter("1", config("bat-row", target_modules=["lin1"]))
    fill_blocks(model)
    model.base_model.set_adapter(["0", "1"])
    model.base_model.keep_originals(False)
    model.add_adapter("2", config(r=2))
    before = snapshot(model)
    with pytest.raises(FlashboneError, match="lin1: without the original weight this merge could not be taken back"):
        model.merge_adapter()
    assert_unchanged(model, before)
    assert not any(layer.keep_original for _, layer in model.base_model._bone_layers())


def test_sums_over_different_layers_take_one_variant_or_are_refused(tmp_path):
    model = get_peft_model(MLP((8, 8, 8)), config("bat-row", target_modules=["lin0"]), adapter_name="0")
    model.add_adapter("1", config("bat-col", target_modules=["lin1"]))
    with pytest.raises(ConfigError, match=r"more than one variant.*\(lin0 is bat-row; lin1 is bat-col\)"):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "s")
    model = get_peft_model(MLP((8, 8, 8)), config("mini", target_modules=["lin0"]), adapter_name="0")
    model.add_adapter("1", config("mini", mini_r=3, target_modules=["lin1"]))
    fill_blocks(model)
    model.add_weighted_adapter(["0", "1"], [1.0, 2.0], "s")
    model.base_model.set_adapter(["0", "1"])
    model.base_model.set_scale("1", 2.0)
    want = model(inputs()[:, :8])
    model.set_adapter("s")
    assert close(model(inputs()[:, :8]), want)
    model.save_pretrained(tmp_path, selected_adapters=["s"])
    again = PeftModel.from_pretrained(MLP((8, 8, 8)), tmp_path / "s")
    assert close(again(inputs()[:, :8]), want)


class Nested(nn.Module):
    """Two layers of which one's name ends in the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.sub = nn.Linear(12, 12), nn.ModuleDict({"lin0": nn.Linear(12, 12)})
        for i, parameter in enumerate(self.parameters()):
            parameter.data.copy_(torch.linspace(-1, 1 + i, parameter.numel()).view(parameter.shape))

    def forward(self, x):
        return self.sub["lin0"](torch.tanh(self.lin0(x)))


@pytest.mark.parametrize("both", [True, False])
def test_sums_are_saved_for_exactly_the_layers_that_they_cover(both, tmp_path):
    exact = {"rank_pattern": {r"\Alin0": 3}} if both else {}
    model = get_peft_model(Nested(), config(target_modules="lin0|sub.lin0" if both else "lin0", **exact))
    fill_blocks(model)
    model.add_weighted_adapter(["default"], [0.5], "s")
    model.set_adapter("s")
    x = torch.linspace(-1, 1, 24).view(2, 12)
    model.save_pretrained(tmp_path, selected_adapters=["s"])
    again = PeftModel.from_pretrained(Nested(), tmp_path / "s")
    assert torch.equal(again(x), model(x))
    assert set(again.base_model.targeted_module_names) == ({"lin0", "sub.lin0"} if both else {"lin0"})


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
        assert torch.equal(PeftModel.from_pretrained(MLP(sizes), tmp_path / variant)(inputs()[:, :8]), want)


def test_state_of_merged_models_is_saved_and_pickled_as_usual(tmp_path):
    model = adapted("bat-col")
    model.merge_adapter()
    want = model(inputs())
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(inputs()), want)
    again.unmerge_adapter()
    assert torch.equal(again.base_model.model.lin0.base_layer.weight, MLP(SIZES).lin0.weight)
    clone = copy.deepcopy(model)
    clone.unmerge_adapter()
    assert torch.equal(model(inputs()), want)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_on_fewer_layers_loads_beside_another(low_cpu_mem_usage, tmp_path):
    model = adapted("bone")
    other = get_peft_model(MLP(SIZES), config("mini", target_modules=["lin0"]), adapter_name="other")
    fill_blocks(other)
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("other")
    assert torch.equal(model(inputs()), other(inputs()))
