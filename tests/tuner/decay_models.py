"""A small model whose layers read a parameter of their own, and adapters that keep a value for it."""

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from flashbone import BoneConfig
from flashbone.tuner.layers.layer import bone_layers
from flashbone.tuner.model.saved_parameters import find
from helpers.comparison import Promise, same_bits

WIDTH = 8
DECAYS = ["blocks.0.att.time_decay", "blocks.1.att.time_decay"]


class Attention(nn.Module):
    """Names as in RWKV-6's own checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.time_maa_x = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.time_decay = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.time_maa_w2 = nn.Parameter(torch.randn(2, 3, WIDTH))
        self.key, self.output = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.ln_x = nn.LayerNorm(WIDTH)

    def decay(self):
        return torch.exp(-torch.exp(self.time_decay))

    def forward(self, x):
        mixed = self.key(x + x.roll(1, -1) * self.time_maa_x) * self.decay() + self.time_maa_w2.sum((0, 1))
        return x + self.output(self.ln_x(mixed))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att = Attention()


class Model(nn.Module):
    checkpoints = False

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block.att, x, use_reentrant=False) if self.checkpoints else block.att(x)
        return x * self.scale


def base(dtype=torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def config(*names, **fields) -> BoneConfig:
    return BoneConfig(**{"r": 4, "target_modules": ["key", "output"], "parameters_to_save": list(names)} | fields)


def inputs(dtype=torch.float32):
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)


def fill(model, adapter="default", seed=1) -> None:
    """Random numbers for all that the adapter has."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".bone_" in name and name.endswith(f".{adapter}"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) / 4


def trained(*names, adapter="default", dtype=torch.float32, seed=1, **fields):
    model = get_peft_model(base(dtype), config(*names, **fields), adapter)
    fill(model, adapter, seed)
    return model


def values(model, adapter="default"):
    held = {saved.name: saved.bone_parameter for saved in find(model)}
    return {name: adapters[adapter].detach() for name, adapters in held.items() if adapter in adapters}


def snapshot(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [name for name, p in model.named_parameters() if p.requires_grad], [*map(type, model.modules())]


def assert_unchanged(model, before) -> None:
    tensors, *rest = snapshot(model)
    assert list(tensors) == list(before[0])
    assert all(same_bits(tensor, before[0][name], Promise.UNTOUCHED) for name, tensor in tensors.items())
    assert rest == list(before[1:])


def by_hand(model, adapter="default") -> Model:
    """The bare model with the adapter's numbers put in by hand."""
    bare = base()
    with torch.no_grad():
        for name, value in values(model, adapter).items():
            bare.get_parameter(name).copy_(value)
        for name, layer in bone_layers(model.base_model.model):
            bare.get_submodule(name).weight += layer.get_delta_weight(adapter)
    return bare
