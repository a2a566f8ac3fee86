"""Weighted sums of adapters as a new adapter: which combine exactly, and to what block."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from flashbone import shards
from flashbone.errors import ConfigError
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.layer import BoneLayer, bone_layers
from flashbone.tuner.layers.parameters import ParamWrapper, own_name
from flashbone.variants.base import Variant
from flashbone.variants.bone import Bone


def add_weighted_adapter(
    model: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> None:
    """See `BoneModel.add_weighted_adapter`."""
    _check_request(model, adapters, weights, adapter_name, combination_type)
    factors = dict(zip(adapters, weights, strict=True))
    combined: dict[str, tuple[Variant, Tensor]] = {}
    for name, layer in bone_layers(model.model):
        offloading.stop_offloading(layer.bone_block)  # an offloaded block holds no numbers
        present = {n: factor * layer.bone_scale[n] for n, factor in factors.items() if n in layer.bone_block}
        if present:
            combined[name] = combine(name, layer, present)
    if _layouts(combined) > 1:  # one adapter has one variant and one mini_r
        for name, layer in bone_layers(model.model):
            if name in combined:
                variant, block = combined[name]
                as_bone = variant.to_bone(block, layer.out_features)
                combined[name] = combined[name] if as_bone is None else (Bone(), as_bone)
    if _layouts(combined) > 1:
        kinds = "; ".join(f"{name} is {variant.name}" for name, (variant, _) in combined.items())
        raise ConfigError(
            f"add_weighted_adapter: the sum has more than one variant, which one adapter cannot have ({kinds});"
            " activate the adapters together (set_adapter) with set_scale instead"
        )

    config: Any = copy.deepcopy(model.peft_config[adapters[0]])
    variant, first = next(iter(combined.values()))
    config.variant, config.init_weights = variant.name, variant.peft_init_weights or True
    wrappers = {name: layer for name, layer in bone_layers(model.model) if isinstance(layer, ParamWrapper)}
    own_names = {name: own_name(name, layer, list(wrappers)) for name, layer in bone_layers(model.model)}
    config.target_parameters = [own_names[name] for name in combined if name in wrappers] or None
    config.target_modules = _exactly(model, {own_names[name] for name in combined if name not in wrappers})
    config.exclude_modules = None
    config.layers_to_transform = config.layers_pattern = None
    sizes = {own_names[name]: kind.block_fields(block)["r"] for name, (kind, block) in combined.items()}
    config.bottleneck_size, config.mini_r = None, 1
    for field, size in variant.block_fields(first).items():
        setattr(config, field, size)
    config.rank_pattern = {rf"\A{re.escape(name)}": r for name, r in sizes.items() if r != config.r}
    config.dropout, config.bias, config.modules_to_save = 0.0, "none", None
    config.inference_mode = True
    model.peft_config[adapter_name] = config
    model.inject_adapter(model.model, adapter_name)
    for name, layer in bone_layers(model.model):
        if name in combined:
            layer.bone_block[adapter_name].data = combined[name][1]


def _layouts(combined: dict[str, tuple[Variant, Tensor]]) -> int:
    """How many different adapters it would take to hold these blocks: r may differ in one, all else may not."""
    fixed = ({**variant.block_fields(block), "r": 0, "name": variant.name} for variant, block in combined.values())
    return len({tuple(sorted(fields.items())) for fields in fixed})


def _exactly(model: BaseTuner, names: set[str]) -> set[str] | str:
    """`target_modules` that match these modules and no others: names or, where others end in them, a pattern."""
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) and name not in names for name, _ in model.model.named_modules()):
        return "|".join(re.escape(name) for name in sorted(names))
    return names


def combine(where: str, layer: BoneLayer, factors: dict[str, float]) -> tuple[Variant, Tensor]:
    """Variant and block of the weighted sum of a layer's adapters.

    Linear in the blocks at equal variant and sizes, but for rotations, whose deltas are no function of a sum of blocks.
    `bone` of block sizes r1 and r2 is `bone` of any common multiple: its delta repeats along the input with period r (a
    whole input is a period, too), and that of `mini` along the output as well.

    Raises:
        ConfigError: no block of the family is that sum.
    """
    blocks = {name: layer.bone_block[name].detach() for name in factors}
    variants = {layer.bone_variant[name] for name in factors}
    is_copy = list(factors.values()) == [1]
    has_one_shape = len({block.shape for block in blocks.values()}) == 1
    if len(variants) == 1 and has_one_shape and (is_copy or all(variant.is_linear for variant in variants)):
        return variants.pop(), _weighted_sum(blocks, factors)
    as_bone = {n: layer.bone_variant[n].to_bone(block, layer.out_features) for n, block in blocks.items()}
    if all(block is not None for block in as_bone.values()):
        r = min(math.lcm(*(layer.bone_r[name] for name in blocks)), layer.in_features)
        wide = {name: shards.tile(block.mT, r).mT for name, block in as_bone.items() if block is not None}
        return Bone(), _weighted_sum(wide, factors)
    got = ", ".join(f"{n!r} is {layer.bone_variant[n].name} with r={layer.bone_r[n]}" for n in factors)
    raise ConfigError(
        f"{where}: {got}; no single adapter is their sum; activate them together (set_adapter) with set_scale instead"
    )


def _weighted_sum(blocks: dict[str, Tensor], factors: dict[str, float]) -> Tensor:
    total = sum(
        blocks[name].to(torch.promote_types(blocks[name].dtype, torch.float32)) * f for name, f in factors.items()
    )
    assert isinstance(total, Tensor)
    return total.to(next(iter(blocks.values())).dtype).contiguous()


def _check_request(
    model: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> None:
    problems = []
    if combination_type != "linear":
        problems.append(f"combination_type: got {combination_type!r}, wanted 'linear', which is exact for the family")
    if adapter_name in model.peft_config:
        problems.append(f"adapter_name: {adapter_name!r} exists already")
    if missing := [name for name in adapters if name not in model.peft_config]:
        problems.append(f"adapters: no {missing} in this model, which has {list(model.peft_config)}")
    if not adapters or len(adapters) != len(set(adapters)):
        problems.append(f"adapters: got {adapters}, wanted one or more different names")
    if len(adapters) != len(weights):
        problems.append(f"weights: got {len(weights)} for {len(adapters)} adapters")
    configs: dict[str, Any] = {name: model.peft_config[name] for name in adapters if name in model.peft_config}
    wholes = {n: c.modules_to_save or c.parameters_to_save or c.bias != "none" for n, c in configs.items()}
    if saved := [name for name, whole in wholes.items() if whole]:
        problems.append(f"adapters: {saved} train modules, parameters or biases whole, and these have no weighted sum")
    if problems:
        raise ConfigError("add_weighted_adapter: " + "; ".join(problems))
