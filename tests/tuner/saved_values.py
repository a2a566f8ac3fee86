"""Small RWKV models, and adapters that train single parameters of them."""

import torch
from peft import PeftModel, get_peft_model

from flashbone import BoneConfig
from flashbone.rwkv import from_pth
from flashbone.tuner.layers.layer import bone_layers
from flashbone.tuner.model.saved_parameters import find
from helpers.comparison import Promise, same_bits

NAMES = {6: ["time_decay", "time_maa_w2", "ffn.time_maa_r"], 7: ["w0", "k_k", "att.x_r"]}
TOKENS = torch.arange(8).view(2, 4)


def config(*names, **fields) -> BoneConfig:
    return BoneConfig(**{"r": 4, "target_modules": ["att.key"], "parameters_to_save": list(names) or None} | fields)


def fill(model, adapter="default", seed=1) -> None:
    """Random numbers for all that the adapter has."""
    source = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith((f".bone_block.{adapter}", f".bone_value.{adapter}")):
            parameter.data = torch.randn(parameter.shape, generator=source).to(parameter) / 4


def trained(file, *names, adapter="default", seed=1, dtype=None, **fields) -> PeftModel:
    model = get_peft_model(from_pth(file, dtype=dtype), config(*names, **fields), adapter).eval()
    fill(model, adapter, seed)
    return model


def values(model, adapter="default") -> dict[str, torch.Tensor]:
    held = {saved.name: saved.bone_value for saved in find(model)}
    return {name: adapters[adapter].detach() for name, adapters in held.items() if adapter in adapters}


def bases(model) -> dict[str, torch.Tensor]:
    return {saved.name: saved.base_layer.detach().clone() for saved in find(model)}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def by_hand(file, model, adapter="default"):
    """The bare model with the adapter's numbers put in by hand."""
    bare = from_pth(file, dtype=model.base_model.model.dtype)
    with torch.no_grad():
        for name, value in values(model, adapter).items():
            bare.get_parameter(name).copy_(value)
        for name, layer in bone_layers(model.base_model.model):
            if adapter in layer.bone_block:
                bare.get_submodule(name).weight += layer.get_delta_weight(adapter)
    return bare


def snapshot(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [name for name, p in model.named_parameters() if p.requires_grad], [*map(type, model.modules())]


def assert_unchanged(model, before) -> None:
    tensors, trains, kinds = snapshot(model)
    assert tensors.keys() == before[0].keys()
    assert all(same_bits(tensor, before[0][name], Promise.UNTOUCHED) for name, tensor in tensors.items())
    assert (sorted(trains), kinds) == (sorted(before[1]), before[2])
