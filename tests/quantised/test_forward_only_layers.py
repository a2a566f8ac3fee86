"""Backends whose layers can only be called (GPTQ, AWQ, EETQ, AQLM, ...): a stand-in has their interface."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from peft import BoneConfig, get_peft_model
from torch import nn

from flashbone.errors import ConfigError
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import Promise, close, same_bits

# Who finds the layer: the name of PEFT's check, the module and the class that it looks for, PEFT's name of the backend.
PACKAGES = {
    "gptq": ("is_gptqmodel_available", "gptqmodel.nn_modules.qlinear", "BaseQuantLinear"),
    "awq": ("is_gptqmodel_available", "gptqmodel.nn_modules.qlinear", "BaseQuantLinear"),
    "eetq": ("is_eetq_available", "eetq", "EetqLinear"),
    "aqlm": ("is_aqlm_available", "aqlm", "QuantizedLinear"),
    "inc": (
        "is_inc_available",
        "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules",
        "PatchedLinear",
    ),
}


class CallableOnly(nn.Module):
    """x W^T by a W that nobody else can read; packed weights are integers, as those of the real layers are."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, None
        self.register_buffer("qweight", torch.zeros(1, dtype=torch.int32))
        W = torch.randn(out_features, in_features) / in_features**0.5
        self._product = lambda x: x @ W.T
        self.W_for_tests = lambda: W

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x).view(*x.shape[:-1], -1)


def install(monkeypatch, backend: str) -> type[nn.Module]:
    """Make PEFT find the package, with the stand-in as its layer."""
    check, path, name = PACKAGES[backend]
    layer = type(name, (CallableOnly,), {})
    parts = path.split(".")
    for i in range(len(parts)):
        module = ModuleType(".".join(parts[: i + 1]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    is_awq = backend == "awq"  # PEFT tells them by a method of the layer
    setattr(module, name, nn.Bilinear if is_awq else layer)
    monkeypatch.setattr(f"peft.utils.quantization_utils.{check}", lambda: True)
    monkeypatch.setattr(
        "peft.utils.quantization_utils.is_gptqmodel_awq_layer", lambda module: is_awq and isinstance(module, layer)
    )
    return layer


@pytest.fixture(params=PACKAGES)
def backend(request):
    return request.param


@pytest.fixture
def model(backend, monkeypatch):
    layer = install(monkeypatch, backend)
    net = nn.Sequential()
    net.add_module("first", layer(12, 8))
    net.add_module("second", layer(8, 6))
    return net


def adapted(model, variant: str):
    peft_model = get_peft_model(model, BoneConfig(r=3, variant=variant, target_modules=["first", "second"], mini_r=2))
    for layer in (peft_model.base_model.model.first, peft_model.base_model.model.second):
        sizes = layer.out_features, layer.in_features
        layer.bone_block["default"].data = random_block(variant, *sizes, 3, mini_r=2, dtype=torch.float32)
    return peft_model


@pytest.mark.parametrize("variant", [name for name in VARIANT_NAMES if name != "bat-col"])
def test_every_variant_that_reads_no_weight_trains(model, variant):
    x = torch.randn(5, 12)
    layers = [model.first, model.second]
    peft_model = adapted(model, variant)
    got = peft_model(x)
    want, blocks = x, []
    for base, layer in zip(layers, peft_model.base_model.model, strict=True):
        block = layer.bone_block["default"]
        W = base.W_for_tests()
        want = want @ (W + layer.bone_variant["default"].delta(W, block)).T
        blocks.append(block)
    assert close(got, want)
    for g, w in zip(*(torch.autograd.grad(y.square().sum(), blocks) for y in (got, want)), strict=True):
        assert close(g, w)


def test_bat_col_is_refused_when_it_is_added_and_the_model_is_as_it_was(model, backend):
    before = list(model)
    with pytest.raises(ConfigError, match=rf"first: bat-col reads .* {backend} .* use variant bat-row"):
        get_peft_model(model, BoneConfig(r=3, variant="bat-col", target_modules=["first", "second"]))
    assert list(model) == before


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_by_name_and_the_adapter_stays(model, backend, merge):
    peft_model = adapted(model, "bat-row")
    x = torch.randn(5, 12)
    want = peft_model(x)
    with pytest.raises(ConfigError, match=rf"first: {backend} layers .* nothing can be merged .*flashbone merge"):
        getattr(peft_model, merge)()
    assert same_bits(peft_model(x), want, Promise.SAME_PRODUCT)


def test_only_adapters_that_read_no_weight_become_loras(model, backend):
    peft_model = adapted(model, "bone")
    _, state = peft_model.to_lora()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not peft_model.supports_lora_conversion()  # PEFT would read the weight
    peft_model = adapted(peft_model.unload(), "bat-row")
    with pytest.raises(ConfigError, match=rf"first: {backend} layers cannot be dequantised"):
        peft_model.to_lora(rank=2)


def test_a_layer_that_normalises_first_is_refused(monkeypatch):
    layer = type("LayerNormLinear", (CallableOnly,), {})
    engine = ModuleType("transformer_engine")
    engine.pytorch = ModuleType("transformer_engine.pytorch")
    for name in ("LayerNormLinear", "LayerNormMLP", "Linear"):
        setattr(engine.pytorch, name, layer if name == "LayerNormLinear" else type(name, (CallableOnly,), {}))
    monkeypatch.setitem(sys.modules, "transformer_engine", engine)
    monkeypatch.setattr("peft.utils.quantization_utils.is_te_pytorch_available", lambda: True)
    model = nn.Sequential(layer(4, 4), engine.pytorch.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"0: .* LayerNormLinear, which normalises"):
        get_peft_model(model, BoneConfig(r=2, target_modules=["0"]))
    assert get_peft_model(model, BoneConfig(r=2, target_modules=["1"]))(torch.randn(2, 4)).shape == (2, 4)


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed; it needs a GPU")
def test_a_real_gptq_layer_is_adapted():
    from gptqmodel.nn_modules.qlinear.torch import TorchQuantLinear

    layer = TorchQuantLinear(bits=4, group_size=32, sym=True, desc_act=False, in_features=64, out_features=64)
    model = get_peft_model(nn.Sequential(layer), BoneConfig(r=8, variant="bat-row", target_modules=["0"]))
    model(torch.randn(2, 64, dtype=torch.float16)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
