"""Small linear layers, quantised by the real packages on the CPU."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from flashbone import BoneLinear
from helpers.blocks import random_block

for package in ("bitsandbytes", "torchao", "hqq"):
    pytest.importorskip(package, reason=f"{package} is not installed; `make test-all` brings it")


class Quantised(NamedTuple):
    """`settings`: what a `BoneLinear` on the layer is to be given; `rounds_input`: its output is not `x W^T + bias`."""

    layer: nn.Module
    settings: dict
    rounds_input: bool = False


def _bnb_4bit(linear: nn.Linear, **fields) -> Quantised:
    import bitsandbytes as bnb

    fields = {"compute_dtype": torch.float32, "quant_type": "nf4", "compress_statistics": False} | fields
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **fields)
    layer.load_state_dict(linear.state_dict())
    return Quantised(layer.to("cpu"), {})


def _bnb_8bit(linear: nn.Linear) -> Quantised:
    import bitsandbytes as bnb

    bias = linear.bias is not None
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return Quantised(layer.to("cpu"), {})


def _torchao(linear: nn.Linear, config: Callable, rounds_input: bool = False) -> Quantised:
    from torchao.quantization import quantize_

    quantize_(linear, config())
    return Quantised(linear, {"get_apply_tensor_subclass": config}, rounds_input)


def _int8_weights():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4_weights():
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def _int8_activations():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _hqq(linear: nn.Linear, nbits: int) -> Quantised:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=nbits, group_size=32, axis=1)
    return Quantised(HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu"), {})


_MAKERS = {
    "bnb nf4": _bnb_4bit,
    "bnb nf4 double": lambda linear: _bnb_4bit(linear, compress_statistics=True),
    "bnb fp4": lambda linear: _bnb_4bit(linear, quant_type="fp4"),
    "bnb int8": _bnb_8bit,
    "torchao int8": lambda linear: _torchao(linear, _int8_weights),
    "torchao int4": lambda linear: _torchao(linear, _int4_weights),
    "torchao int8 activations": lambda linear: _torchao(linear, _int8_activations, rounds_input=True),
    "hqq 4": lambda linear: _hqq(linear, 4),
    "hqq 8": lambda linear: _hqq(linear, 8),
}
BACKENDS = tuple(_MAKERS)


def quantised_linear(
    backend: str, out: int = 96, in_: int = 64, bias: bool = True, weight: Tensor | None = None
) -> Quantised:
    """A layer of that backend, frozen, made of a random weight or of the given one; sizes of 32 suit them all."""
    linear = nn.Linear(in_, out, bias)
    if weight is not None:
        linear.weight.data.copy_(weight)
    made = _MAKERS[backend](copy.deepcopy(linear))
    made.layer.requires_grad_(False)
    return made


def adapted(made: Quantised, r: int, *names: str) -> BoneLinear:
    """The layer with one adapter of each variant, all active, with random blocks."""
    layer = BoneLinear(made.layer, names[0], r, variant=names[0], mini_r=3, **made.settings)
    for name in names[1:]:
        layer.update_layer(name, r, True, variant=name, mini_r=3)
    for name in names:
        sizes = layer.out_features, layer.in_features
        layer.bone_block[name].data = random_block(name, *sizes, r, dtype=torch.float32, std=0.1)
    layer.set_adapter(list(names))
    return layer


def dequantised(layer: nn.Module, in_: int = 64) -> Tensor:
    """W (out, in) as the layer's own calls show it, for layers that do not round their input."""
    with torch.no_grad():
        return (layer(torch.eye(in_)) - layer(torch.zeros(1, in_))).T
