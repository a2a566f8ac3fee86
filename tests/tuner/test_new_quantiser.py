"""A quantiser that flashbone does not know: one class and one entry in `KINDS` let all its layers be adapted."""

import pytest
import torch
from peft import BoneConfig, get_peft_model
from torch import Tensor, nn

from flashbone import BoneLinear
from flashbone.tuner.layers import quantized
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits

R = 4


class ToyLinear(nn.Module):
    """A linear layer in whole hundredths."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.bias = None
        self.packed = nn.Parameter((W * 100).round().to(torch.int16), requires_grad=False)

    def dequantize(self) -> Tensor:
        return self.packed.float() / 100

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().T


class ToyBackend:
    """PEFT's side of it, which writes to a new layer."""

    supports_merge, backend_name = True, "toy"

    def get_base_weight(self, base: ToyLinear) -> Tensor:
        return base.dequantize()

    def set_base_weight(self, layer: BoneLinear, W: Tensor) -> None:
        layer.base_layer = ToyLinear(W)


class ToyKind(quantized.QuantizedKind):
    def parameter(self, module: ToyLinear) -> Tensor:
        return module.packed

    def _state(self, module: ToyLinear) -> dict[str, Tensor]:
        return {"packed": module.packed}

    def _put(self, module: ToyLinear, state: dict[str, Tensor]) -> None:
        module.packed = nn.Parameter(state["packed"], requires_grad=False)

    def _take_over(self, module: ToyLinear, written: ToyLinear) -> None:
        self._put(module, self._state(written))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The new entry; and what PEFT and an imported package would be."""
    monkeypatch.setitem(quantized.KINDS, "toy", ToyKind)
    monkeypatch.setattr(quantized, "PACKAGES", ("torch",))
    find = lambda module, **_: ToyBackend() if isinstance(module, ToyLinear) else None  # noqa: E731
    monkeypatch.setattr(quantized, "resolve_quantization_backend", find)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_layer_is_adapted_merged_and_unmerged_bit_for_bit(variant):
    base, x = ToyLinear(torch.randn(12, 9)), torch.randn(5, 9)
    before = base.packed.clone()
    layer = BoneLinear(base, "default", R, False, variant=variant, mini_r=3).eval()
    with torch.no_grad():
        delta = layer.get_delta_weight("default")
        assert close(layer(x), base(x) + x @ delta.T, torch.float32)
        layer.merge()
        assert (base.dequantize() - (before / 100 + delta)).abs().max() < 0.006
        layer.unmerge()
    assert same_bits(base.packed, before, Promise.UNTOUCHED)


def test_all_linear_takes_its_layers():
    model = nn.Sequential(ToyLinear(torch.randn(6, 9)), nn.ReLU(), nn.Linear(6, 3))
    adapted = get_peft_model(model, BoneConfig(r=R, target_modules="all-linear"))
    assert isinstance(adapted.base_model.model[0], BoneLinear)
    assert isinstance(adapted.base_model.model[2], BoneLinear)
