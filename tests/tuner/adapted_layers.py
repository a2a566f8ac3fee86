"""Single layers with adapters on them, and what the fp64 oracle makes of the same blocks."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flashbone import BoneLinear
from helpers import reference
from helpers.blocks import random_block

OUT, IN = 11, 13


def make_layer(kind: str = "Linear", dtype: torch.dtype = torch.float64, out: int = OUT, in_: int = IN) -> nn.Module:
    base = nn.Linear(in_, out) if kind == "Linear" else Conv1D(out, in_)
    base.weight.data = torch.randn(base.weight.shape) / in_**0.5
    base.bias.data = torch.randn(out)
    return base.to(dtype)


def adapt(base: nn.Module, adapters: dict[str, str], std: float = 0.3, r: int = 3, **fields) -> BoneLinear:
    """A layer with adapters given as name -> variant, of growing block size, all active."""
    layer = None
    for i, (name, variant) in enumerate(adapters.items()):
        kwargs = {"variant": variant, "mini_r": 2, **fields}
        if layer is None:
            layer = BoneLinear(base, name, r + i, True, **kwargs)
        else:
            layer.update_layer(name, r + i, True, **kwargs)
        block = random_block(variant, layer.out_features, layer.in_features, r + i, mini_r=2, std=std)
        layer.bone_block[name].data = block.to(layer.bone_block[name])
    layer.set_adapter(list(adapters))
    return layer


def oracle(layer: BoneLinear, x: torch.Tensor, W: torch.Tensor, names: list[str] | None = None) -> torch.Tensor:
    names = layer.active_adapters if names is None else names
    adapters = [(layer.bone_variant[n].name, layer.bone_block[n].detach(), layer.bone_scale[n]) for n in names]
    return reference.forward(x, W, layer.get_base_layer().bias.detach(), adapters)


def pristine(base: nn.Module) -> torch.Tensor:
    """(out, in), cloned."""
    weight = base.weight.detach().clone()
    return weight.T if isinstance(base, Conv1D) else weight


THREE = {"a": "bat-row", "b": "bone", "c": "bat-col"}
