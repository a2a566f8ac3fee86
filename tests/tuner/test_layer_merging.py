"""Merging adapters into one layer and taking them out again, to the bit where the original is kept."""

import pytest
import torch
from adapted_layers import IN, THREE, adapt, make_layer, oracle, pristine

from flashbone.errors import FlashboneError, NonFiniteError
from helpers import reference
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, relative_error, same_bits


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("adapters", [*({"a": v} for v in VARIANT_NAMES), THREE, THREE | {"d": "mini", "e": "bat-col"}])
def test_forward_merge_and_unmerge_follow_the_oracle(kind, adapters):
    base = make_layer(kind)
    W, x = pristine(base), torch.randn(4, IN, dtype=torch.float64)
    layer = adapt(base, adapters)
    want = oracle(layer, x, W)
    assert close(layer(x), want)
    layer.merge()
    assert close(layer(x), want)
    blocks = [(layer.bone_variant[n].name, layer.bone_block[n].detach()) for n in adapters]
    assert close(pristine(base), W + sum(reference.delta(variant, W, block) for variant, block in blocks))
    layer.unmerge()
    assert same_bits(pristine(base), W, Promise.UNTOUCHED)
    assert close(layer(x), want)


@pytest.mark.parametrize("name", VARIANT_NAMES)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_get_delta_weight_is_the_difference_also_while_merged(kind, name):
    base = make_layer(kind)
    before = base.weight.detach().clone()
    layer = adapt(base, {"a": name})
    layer.set_scale("a", -0.5)
    delta = layer.get_delta_weight("a")
    layer.merge()
    assert close(base.weight.detach() - before, delta)
    assert same_bits(layer.get_delta_weight("a"), delta, Promise.SAME_PRODUCT)
    assert same_bits(layer.get_delta_weight("a", before), delta, Promise.SAME_PRODUCT)
    assert layer.supports_lora_conversion()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("adapters", [*({"a": v} for v in VARIANT_NAMES), THREE])
def test_merging_and_unmerging_100_times_is_bit_exact(adapters, dtype):
    base = make_layer(dtype=dtype)
    before = base.weight.detach().clone()
    layer = adapt(base, adapters)
    merged = []
    for i in range(100):
        layer.merge(safe_merge=bool(i % 2))
        merged.append(base.weight.detach().clone())
        layer.unmerge()
    assert same_bits(base.weight, before, Promise.UNTOUCHED)
    assert all(same_bits(weight, merged[0], Promise.SAME_PRODUCT) for weight in merged)
    assert relative_error(merged[0], before) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_order_of_merges_does_not_change_a_bit(dtype):
    base = make_layer(dtype=dtype)
    layer = adapt(base, THREE)
    weights = []
    for order in (["a", "b", "c"], ["c", "a", "b"]):
        layer.merge(adapter_names=order)
        weights.append(base.weight.detach().clone())
        layer.unmerge()
    layer.merge(adapter_names=["b"])
    for name in ["c", "a"]:
        with pytest.warns(UserWarning, match="additionally merging"):
            layer.merge(adapter_names=[name])
    weights.append(base.weight.detach().clone())
    assert layer.merged_adapters == ["b", "c", "a"]
    assert same_bits(weights[0], weights[1], Promise.SAME_PRODUCT)
    assert same_bits(weights[0], weights[2], Promise.SAME_PRODUCT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_a_safe_merge_that_fails_changes_nothing(name, bad):
    base = make_layer()
    before = base.weight.detach().clone()
    layer = adapt(base, {"a": name})
    layer.bone_block["a"].data.flatten()[0] = bad
    with pytest.raises(NonFiniteError, match=r"adapter 'a': the merged weight would hold .* NaN or infinite"):
        layer.merge(safe_merge=True)
    assert same_bits(base.weight, before, Promise.UNTOUCHED)
    assert not layer.merged


@pytest.mark.parametrize("adapters", [*({"a": v} for v in VARIANT_NAMES), {"a": "bone", "b": "bat-col", "c": "mini"}])
@pytest.mark.parametrize("size", [(12, 12), (11, 13), (5, 4)], ids=str)
def test_without_the_original_unmerging_computes_the_base_back(size, adapters):
    base = make_layer(out=size[0], in_=size[1])
    before = base.weight.detach().clone()
    layer = adapt(base, adapters, std=0.1)
    layer.keep_original = False
    layer.merge()
    assert layer._original_weight is None
    layer.unmerge()
    assert relative_error(base.weight, before) < 1e-13


def test_without_the_original_two_adapters_that_need_the_weight_are_refused():
    base = make_layer()
    before = base.weight.detach().clone()
    layer = adapt(base, {"a": "bat-row", "b": "bat-col"})
    layer.keep_original = False
    with pytest.raises(FlashboneError, match="not be undone: two of these adapters depend on the base weight"):
        layer.merge()
    assert same_bits(base.weight, before, Promise.UNTOUCHED)
    layer.keep_original = True
    layer.merge()
    layer.unmerge()
    assert same_bits(base.weight, before, Promise.UNTOUCHED)


@pytest.mark.parametrize("name", ["bat-col", "bat-row"])
def test_without_the_original_a_merge_that_cannot_be_inverted_is_refused(name):
    base = make_layer(out=12, in_=12)
    before = base.weight.detach().clone()
    layer = adapt(base, {"a": name})
    layer.bone_block["a"].data = -torch.eye(3, dtype=torch.float64).expand(4, 3, 3).clone()
    layer.keep_original = False
    with pytest.raises(FlashboneError, match="was multiplied is nearly singular; leave keep_original on"):
        layer.merge()
    assert same_bits(base.weight, before, Promise.UNTOUCHED)
    assert not layer.merged


@pytest.mark.parametrize("keep", [True, False])
def test_a_merge_that_stands_sees_neither_new_scales_nor_new_blocks(keep):
    base = make_layer()
    before = base.weight.detach().clone()
    layer = adapt(base, {"a": "bat-col", "b": "bone"}, std=0.1)
    layer.keep_original = keep
    layer.merge(adapter_names=["a"])
    alone = base.weight.detach() - before
    layer.set_scale("a", 0.5)
    layer.bone_block["a"].data.mul_(3)
    with pytest.warns(UserWarning, match="additionally merging"):
        layer.merge(adapter_names=["b", "b"])
    assert layer.merged_adapters == ["a", "b"]
    assert close(base.weight.detach() - before, alone + layer.get_delta_weight("b"), torch.float32)
    layer.unmerge()
    if keep:
        assert same_bits(base.weight, before, Promise.UNTOUCHED)
    else:
        assert relative_error(base.weight, before) < 1e-13


def test_merging_in_inference_mode_leaves_a_weight_that_can_be_used_in_training():
    base = make_layer()
    layer = adapt(base, {"a": "bat-row"})
    with torch.inference_mode():
        layer.merge(safe_merge=True)
    assert not base.weight.is_inference()
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert close(x.grad, base.weight.detach().sum(0).expand(2, IN))


def test_the_original_takes_no_extra_memory_on_the_cpu():
    base = make_layer()
    storage = base.weight.data_ptr()
    layer = adapt(base, {"a": "bat-col"})
    layer.merge()
    assert layer._original_weight.data_ptr() == storage
    layer.unmerge()
    assert base.weight.data_ptr() == storage
    assert layer._original_weight is None


def test_unmerging_an_unmerged_layer_warns():
    with pytest.warns(UserWarning, match="Already unmerged"):
        adapt(make_layer(), {"a": "bone"}).unmerge()
