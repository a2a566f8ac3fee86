"""Configurations and files that do not fit a model: every reason is named, and the model stays as it was."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from adapted_models import SIZES, adapted, assert_unchanged, config, inputs, snapshot
from peft import BoneConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from flashbone.errors import ConfigError, FlashboneError, ShapeError
from helpers.comparison import Promise, same_bits
from helpers.mlp import MLP, fill_blocks

# ---- bad input


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"r": 0}, ["`r` should be a positive integer value but the value passed is 0"]),
        ({"r": 2.5}, ["`r` should be a positive integer value but the value passed is 2.5"]),
        ({"variant": "bat"}, ["variant: got 'bat', wanted one of 'bone', 'mini', 'bat-col', 'bat-row'"]),
        ({"init_weights": "mini"}, ["init_weights: got 'mini'", "choose variants by `variant`"]),
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
    assert same_bits(model(inputs()), want, Promise.SAME_PRODUCT)
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
    assert all(same_bits(v, state[k], Promise.UNTOUCHED) for k, v in model.state_dict().items())


def test_loading_other_methods_is_as_it_was_without_flashbone(tmp_path):
    lora = LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False)
    model = get_peft_model(MLP(SIZES), lora)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MLP(SIZES), tmp_path)
    again.load_adapter(tmp_path, "second")
    assert same_bits(again(inputs()), model(inputs()), Promise.SAME_PRODUCT)
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
