"""Merging into quantised layers: requantised with the same settings, and taken out again bit for bit."""

import pytest
import torch

from flashbone import variants
from flashbone.errors import FlashboneError, NonFiniteError
from flashbone.tuner.layers.layer import BoneLinear
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, relative_error, same_bits
from helpers.quantised import BACKENDS, adapted, quantised_linear

pytestmark = pytest.mark.beside

OUT, IN, R = 96, 64, 10


def tensors_of(value, found=None) -> list[torch.Tensor]:
    """Every tensor that makes up a quantised weight, in a fixed order."""
    if isinstance(value, torch.Tensor):
        inner = getattr(value, "tensor_data_names", None)
        return [getattr(value, name) for name in inner] if inner else [value.data]
    if type(value).__name__ in ("QuantState", "MatmulLtState"):
        value = vars(value)
    if isinstance(value, dict):
        return [t for key in sorted(value, key=str) for t in tensors_of(value[key])]
    return []


def weight_tensors(layer: BoneLinear) -> list[torch.Tensor]:
    return tensors_of(layer.base_kind._state(layer.get_base_layer()))


def settings_of(value) -> dict:
    """What is not a tensor in what makes up a quantised weight: types, packing, group sizes."""
    if type(value).__name__ in ("QuantState", "MatmulLtState"):
        value = vars(value)
    if isinstance(value, dict):
        kept = {key: settings_of(inner) for key, inner in value.items() if key not in ("module", "code")}
        return {key: inner for key, inner in kept.items() if inner not in (None, {})}
    if isinstance(value, torch.Tensor):
        names = getattr(value, "tensor_attribute_names", ())
        return {"type": type(value), "shape": value.shape, **{name: str(getattr(value, name)) for name in names}}
    return value


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def made(backend):
    return quantised_linear(backend)


@pytest.mark.parametrize("names", [*[(name,) for name in VARIANT_NAMES], VARIANT_NAMES], ids=str)
def test_a_merge_requantises_with_the_same_settings_and_unmerge_restores_every_bit(backend, made, names):
    layer = adapted(made, R, *names)
    x = torch.randn(5, IN)
    base = made.layer(x)
    before, settings = [t.clone() for t in weight_tensors(layer)], settings_of(layer.base_kind._state(made.layer))
    places = [t.data_ptr() for t in weight_tensors(layer)]
    deltas = {name: layer.get_delta_weight(name) for name in names}
    W = layer.base_kind.weight(made.layer)
    want = W + sum(deltas.values())
    assert close(layer._merged_weight(list(names), must_be_finite=False), want, torch.float32)

    layer.merge(safe_merge=True)
    merged = layer(x)
    assert settings_of(layer.base_kind._state(made.layer)) == settings
    got = layer.base_kind.weight(made.layer)
    noise = relative_error(requantised(backend, want), want)
    assert 0 < relative_error(got, want) <= 1.01 * noise
    assert relative_error(got, want) < 0.5 * relative_error(W, want)
    assert same_bits(merged, made.layer(x), Promise.SAME_PRODUCT)
    assert all(close(layer.get_delta_weight(name), deltas[name]) for name in names)

    layer.unmerge()
    after = weight_tensors(layer)
    assert [t.data_ptr() for t in after] == places
    assert all(same_bits(a, b, Promise.UNTOUCHED) for a, b in zip(after, before, strict=True))
    assert same_bits(made.layer(x), base, Promise.SAME_PRODUCT)


def requantised(backend: str, W: torch.Tensor) -> torch.Tensor:
    """What the backend makes of W, in a layer of its own."""
    made = quantised_linear(backend, *W.shape, weight=W)
    return BoneLinear(made.layer, "default", R, **made.settings).base_kind.weight(made.layer)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_twenty_rounds_of_merging_leave_the_outputs_as_they_were(made):
    layer, x = adapted(made, R, "bat-col", "bone"), torch.randn(5, IN)
    layer.keep_original = False  # a quantised original is kept in any case
    with torch.no_grad():
        want, base = layer(x), made.layer(x)
        merged = []
        for _ in range(20):
            layer.merge(adapter_names=["bone"])
            layer.merge(adapter_names=["bat-col"])
            merged.append(layer(x))
            layer.unmerge()
        assert all(same_bits(y, merged[0], Promise.SAME_PRODUCT) for y in merged)
        assert same_bits(layer(x), want, Promise.SAME_PRODUCT)
        assert same_bits(made.layer(x), base, Promise.SAME_PRODUCT)


def test_unloading_gives_the_bare_quantised_layer_with_the_adapters_in_it(made):
    layer, x = adapted(made, R, "bat-row", "mini"), torch.randn(5, IN)
    with torch.no_grad():
        layer.merge()
        want = layer(x)
        layer.unmerge()
        bare = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        assert bare is made.layer
        assert same_bits(bare(x), want, Promise.SAME_PRODUCT)
        assert layer._original_weight is None


def test_a_safe_merge_of_nan_changes_nothing(made):
    layer, x = adapted(made, R, "bone"), torch.randn(5, IN)
    layer.bone_block["bone"].data[0, 0] = torch.nan
    base = made.layer(x)
    with pytest.raises(NonFiniteError, match="nothing was changed"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert same_bits(made.layer(x), base, Promise.SAME_PRODUCT)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("standing", [[], ["bone"]], ids=["first", "second"])
def test_a_merge_that_fails_while_it_requantises_leaves_the_layer_as_it_was(made, standing, monkeypatch):
    layer, x = adapted(made, R, "bone", "bat-row"), torch.randn(5, IN)
    base = made.layer(x)
    if standing:
        layer.merge(adapter_names=standing)
    want = made.layer(x)

    def fail(self, holder, W):
        parameters = holder.get_base_layer()._parameters
        parameters.pop("weight", None), parameters.pop("W_q", None)
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(layer.base_kind.backend), "set_base_weight", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            layer.merge(adapter_names=["bat-row"])
    assert layer.merged_adapters == standing
    assert same_bits(made.layer(x), want, Promise.SAME_PRODUCT)
    if standing:
        layer.unmerge()
    assert layer._original_weight is None
    assert same_bits(made.layer(x), base, Promise.SAME_PRODUCT)


def test_a_torchao_layer_of_unknown_settings_trains_but_is_not_merged_into():
    made = quantised_linear("torchao int8")
    layer = adapted(made._replace(settings={}), R, "bat-col")
    layer(torch.randn(2, IN)).sum().backward()
    assert layer.bone_block["bat-col"].grad.abs().max() > 0
    with pytest.raises(FlashboneError, match=r"settings .* are unknown.*TorchAoConfig"):
        layer.merge()
    assert not layer.merged


def test_the_difference_of_an_adapter_is_that_of_the_dequantised_weight(made):
    layer = adapted(made, R, *VARIANT_NAMES)
    W = layer.base_kind.weight(made.layer).double()
    for name in VARIANT_NAMES:
        want = variants.get(name).delta(W, layer.bone_block[name].detach().double())
        assert close(layer.get_delta_weight(name), want, torch.float32)
