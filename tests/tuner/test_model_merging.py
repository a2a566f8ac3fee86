"""Merging all layers of a model, and taking it back; a merge that fails touches none of them."""

import copy

import pytest
import torch
from adapted_models import SIZES, adapted, assert_unchanged, config, inputs, snapshot
from peft import get_peft_model
from torch import nn

from flashbone.errors import ConfigError, FlashboneError, NonFiniteError
from flashbone.tuner.layers.layer import bone_layers
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import MLP, fill_blocks

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
    assert same_bits(model(inputs()), want, Promise.SAME_PRODUCT)


def test_disabling_while_merged_gives_the_base_and_originals_can_be_dropped():
    model = adapted("bone")
    base = MLP(SIZES)(inputs())
    model.merge_adapter()
    with model.disable_adapter():
        assert same_bits(model(inputs()), base, Promise.SAME_PRODUCT)
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
    with pytest.raises(FlashboneError, match="lin1: without the original weight this merge could not be undone"):
        model.merge_adapter()
    assert_unchanged(model, before)
    assert not any(layer.keep_original for _, layer in bone_layers(model.base_model.model))


def test_state_of_merged_models_is_saved_and_pickled_as_usual(tmp_path):
    model = adapted("bat-col")
    model.merge_adapter()
    want = model(inputs())
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert same_bits(again(inputs()), want, Promise.SAME_PRODUCT)
    again.unmerge_adapter()
    assert same_bits(again.base_model.model.lin0.base_layer.weight, MLP(SIZES).lin0.weight, Promise.UNTOUCHED)
    clone = copy.deepcopy(model)
    clone.unmerge_adapter()
    assert same_bits(model(inputs()), want, Promise.SAME_PRODUCT)
