"""The orthogonal variant in a model: its configuration, its unconstrained twin, sizes, files, and what is refused."""

import json

import numpy as np
import pytest
import torch
from peft import BoneConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from flashbone import variants
from flashbone.errors import ConfigError, FormatError, ShapeError
from flashbone.files import peft as checkpoint
from flashbone.merge import merge_checkpoint
from helpers import reference
from helpers.adapter_folders import tiny_bert
from helpers.blocks import random_block
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import MLP, fill_blocks

SIZES = (13, 9, 6)
TARGETS = {"target_modules": ["lin0", "lin1"]}


def inputs() -> torch.Tensor:
    return torch.randn(3, SIZES[0], dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def adapted(**fields) -> PeftModel:
    model = get_peft_model(MLP(SIZES), BoneConfig(**TARGETS | {"bottleneck_size": 4} | fields))
    fill_blocks(model)
    return model


def oracle(**fields) -> nn.Module:
    """The MLP with the deltas of `adapted` in its weights, by the oracle; `eps`, or `free=True` for the twin."""
    model = MLP(SIZES)
    for name, layer in adapted().base_model.model.named_children():
        P = layer.bone_block["default"].detach()
        Q = torch.eye(4) + P if fields.get("free") else reference.rotation(P, fields.get("eps", 1e-6))
        weight = model.get_submodule(name).weight
        weight.data = weight + reference.delta("orthogonal", weight, P, Q)
    return model


def test_bottleneck_size_asks_for_the_variant():
    config = BoneConfig(bottleneck_size=32)
    assert (config.variant, config.r, config.bottleneck_size) == ("orthogonal", 32, 32)
    assert (config.use_orthogonal, config.orthogonal_eps) == (True, 1e-6)
    assert BoneConfig(variant="orthogonal", r=16).r == 16
    assert BoneConfig(variant="orthogonal", r=16, bottleneck_size=16).r == 16
    assert BoneConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bottleneck_size": 8, "variant": "bat-col"}, "asks for the variant 'orthogonal', but variant='bat-col'"),
        ({"bottleneck_size": 8, "init_weights": "bat"}, "asks for the variant 'orthogonal', but init_weights='bat'"),
        ({"bottleneck_size": 8, "r": 16}, "bottleneck_size=8 and r=16 are one size; leave r out"),
        ({"bottleneck_size": 0}, "`bottleneck_size` should be a positive integer value but the value passed is 0"),
        ({"bottleneck_size": 8.0}, "`bottleneck_size` should be a positive integer"),
        ({"use_orthogonal": False}, "use_orthogonal=False belongs to the variant 'orthogonal', but variant='bone'"),
        ({"variant": "mini", "orthogonal_eps": 1e-4}, "orthogonal_eps=0.0001 belongs to the variant 'orthogonal'"),
        *(
            ({"bottleneck_size": 8, "orthogonal_eps": eps}, r"orthogonal_eps: got .*, wanted a number in \(0, 0.01\]")
            for eps in (0, -1e-6, 0.011, "1e-6", float("nan"), None)
        ),
        ({"bottleneck_size": 8, "use_orthogonal": "yes"}, "use_orthogonal: got 'yes', wanted True or False"),
        ({"bottleneck_size": 8, "init_weights": "orthogonal"}, "init_weights: got 'orthogonal', wanted True, False"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        BoneConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "*.q_proj"}, r"target_modules: '\*.q_proj' is not a regular expression \(nothing to"),
        ({"exclude_modules": "["}, r"exclude_modules: '\[' is not a regular expression"),
        ({"rank_pattern": {"[": 8}}, r"rank_pattern: '\[' is not a regular expression"),
        ({"target_modules": [0, 2]}, "target_modules: got .*, wanted names of modules"),
    ],
)
def test_patterns_and_names_that_are_none_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        BoneConfig(**fields)


def test_numbers_of_numpy_are_saved_as_plain_ones(tmp_path):
    fields = {"bottleneck_size": np.int64(4), "orthogonal_eps": np.float32(1e-6), "rank_pattern": {"lin1": np.int8(3)}}
    adapted(**fields, dropout=np.float64(0.25)).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(MLP(SIZES), tmp_path).peft_config["default"].dropout == 0.25


def test_a_block_size_that_was_set_later_is_saved(tmp_path):
    config = BoneConfig(bottleneck_size=8, **TARGETS)
    config.r = 4
    get_peft_model(MLP(SIZES), config).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(MLP(SIZES), tmp_path).peft_config["default"].r == 4


def test_every_contradiction_is_named_at_once():
    with pytest.raises(ConfigError, match=r"bottleneck_size=8 asks.*dropout: got 2.*orthogonal_eps: got 5"):
        BoneConfig(bottleneck_size=8, variant="bat-col", orthogonal_eps=5, dropout=2)


def test_a_bottleneck_larger_than_a_layer_is_refused_and_the_model_stays_as_it_was():
    base = MLP(SIZES)
    with pytest.raises(ShapeError, match="lin1: a bottleneck of 10 is larger than the 9 input features of this layer"):
        get_peft_model(base, BoneConfig(bottleneck_size=10, **TARGETS))
    assert type(base.lin0) is nn.Linear
    assert all(p.requires_grad for p in base.parameters())
    model = get_peft_model(base, BoneConfig(bottleneck_size=10, rank_pattern={"lin1": 9}, **TARGETS))
    assert model.base_model.model.lin1.bone_block["default"].shape == (9, 9)


@pytest.mark.parametrize("fields", [{}, {"orthogonal_eps": 1e-2}, {"use_orthogonal": False}], ids=str)
def test_forward_merge_unmerge_and_files_follow_the_oracle(fields, tmp_path):
    model = adapted(**fields)
    want = oracle(eps=fields.get("orthogonal_eps", 1e-6), free=not fields.get("use_orthogonal", True))(inputs())
    assert close(model(inputs()), want)
    before = [p.clone() for p in MLP(SIZES).parameters()]
    model.merge_adapter(safe_merge=True)
    assert close(model(inputs()), want)
    model.unmerge_adapter()
    base = [p for n, p in model.named_parameters() if "bone_" not in n]
    assert all(same_bits(a, b, Promise.UNTOUCHED) for a, b in zip(base, before, strict=True))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.lin{i}.bone_block" for i in (0, 1)
    }
    again = PeftModel.from_pretrained(MLP(SIZES), tmp_path)
    assert same_bits(again(inputs()), model(inputs()), Promise.SAME_PRODUCT)
    assert close(again.merge_and_unload()(inputs()), want)


def test_the_settings_change_the_function():
    outputs = [adapted(**fields)(inputs()) for fields in ({}, {"orthogonal_eps": 1e-2}, {"use_orthogonal": False})]
    assert not any(close(a, b) for a in outputs for b in outputs if a is not b)


@pytest.mark.parametrize("fields", [{}, {"use_orthogonal": False}], ids=str)
def test_merging_without_the_original_is_computed_back(fields):
    model = adapted(**fields)
    model.base_model.keep_originals(False)
    model.merge_adapter()
    model.unmerge_adapter()
    assert close(model.base_model.model.lin0.base_layer.weight.detach(), MLP(SIZES).lin0.weight.detach())


def test_rotations_of_several_settings_and_sizes_add_up():
    model = adapted()
    model.add_adapter("free", BoneConfig(bottleneck_size=4, use_orthogonal=False, **TARGETS))
    model.add_adapter("small", BoneConfig(bottleneck_size=3, orthogonal_eps=1e-2, **TARGETS))
    model.add_adapter("plain", BoneConfig(r=5, **TARGETS))
    fill_blocks(model)
    model.base_model.set_adapter(["default", "free", "small", "plain"])
    model.base_model.set_scale("small", -0.5)
    with torch.no_grad():
        outputs = [model(inputs()), model.eval()(inputs()), model(inputs())]
    model.merge_adapter()
    assert all(close(y, model(inputs()).detach()) for y in outputs)


def test_weighted_sums_exist_for_the_unconstrained_twin_alone():
    model = adapted(use_orthogonal=False)
    model.add_adapter("other", BoneConfig(bottleneck_size=4, use_orthogonal=False, **TARGETS))
    fill_blocks(model)
    model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum")
    layer = model.base_model.model.lin0
    want = 0.7 * layer.get_delta_weight("default") - 1.3 * layer.get_delta_weight("other")
    assert close(layer.get_delta_weight("sum"), want)
    assert model.peft_config["sum"].use_orthogonal is False
    model = adapted()
    model.add_weighted_adapter(["default"], [1.0], "twin")  # of a rotation, nothing but this
    twin, own = (layer_of(model).get_delta_weight(name) for name in ("twin", "default"))
    assert same_bits(twin, own, Promise.SAME_PRODUCT)


def layer_of(model):
    return model.base_model.model.lin0


def test_unconstrained_twins_of_any_eps_are_one_variant():
    twins = [variants.get("orthogonal", use_orthogonal=False, eps=eps) for eps in (1e-6, 1e-2)]
    assert twins[0] == twins[1] != variants.get("orthogonal")


@pytest.mark.parametrize("fields", [{"orthogonal_eps": 1e-2}, {"use_orthogonal": False}], ids=str)
def test_a_checkpoint_is_merged_with_the_settings_of_the_adapter(fields, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    base = tiny_bert().from_pretrained(tmp_path / "base")
    model = get_peft_model(base, BoneConfig(bottleneck_size=5, target_modules=["dense", "value"], **fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = random_block("orthogonal", 5, 5, 5, dtype=torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    want = model.merge_and_unload().state_dict()
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(same_bits(got[name], want[name], Promise.SAME_PRODUCT) for name in got)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["variant"], config["r"], config["bottleneck_size"]) == ("orthogonal", 5, 5)


def test_a_file_that_names_only_a_bottleneck_is_read_alike_by_both_readers(tmp_path):
    adapted(use_orthogonal=False).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({name: config[name] for name in config if name not in ("variant", "r")}))
    adapter = checkpoint.read(tmp_path)
    assert (adapter.variant, adapter.config["r"]) == (variants.get("orthogonal", use_orthogonal=False), 4)
    loaded = PeftModel.from_pretrained(MLP(SIZES), tmp_path)
    assert loaded.base_model.model.lin0.bone_variant["default"] == adapter.variant
    file.write_text(json.dumps(config | {"bottleneck_size": 5}))
    with pytest.raises(FormatError, match="bottleneck_size: got 5, wanted r, which is 4"):
        checkpoint.read(tmp_path)
    file.write_text(json.dumps(config | {"orthogonal_eps": 0.5}))
    with pytest.raises(FormatError, match=r"orthogonal_eps: got 0.5, wanted a number in \(0, 0.01\]"):
        checkpoint.read(tmp_path)


def test_training_keeps_the_rotation_orthogonal_and_dropout_spares_the_base():
    torch.manual_seed(0)
    model = adapted(dropout=0.3).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(60):
        loss = (model(inputs()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    layer = model.base_model.model.lin0
    W, merged = layer.get_base_layer().weight.detach(), layer.get_delta_weight("default") + layer.base_layer.weight
    # Rows are rotated, shard by shard, so their lengths are those of W.
    assert close(merged.detach().norm(dim=1), W.norm(dim=1), torch.float32)
