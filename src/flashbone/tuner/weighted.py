"""Weighted sums of adapters as a new adapter: which combine exactly, and to what block."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashbone import shards
from flashbone.errors import ConfigError
from flashbone.tuner.layer import BoneLayer

if TYPE_CHECKING:
    from flashbone.tuner.model import BoneModel


def add_weighted_adapter(
    model: BoneModel, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> None:
    """See `BoneModel.add_weighted_adapter`."""
    _check_request(model, adapters, weights, adapter_name, combination_type)
    factors = dict(zip(adapters, weights, strict=True))
    combined: dict[str, tuple[str, Tensor]] = {}
    for name, layer in model._bone_layers():
        present = {n: factor * layer.bone_scale[n] for n, factor in factors.items() if n in layer.bone_block}
        if present:
            combined[name] = combine(name, layer, present)
    kinds = {variant for variant, _ in combined.values()}
    if "bone" in kinds and "mini" in kinds:  # one adapter is of one variant: widen the mini blocks to bone
        for name, layer in model._bone_layers():
            if name in combined:
                combined[name] = "bone", shards.tile(combined[name][1], layer.out_features)

    config = copy.deepcopy(model.peft_config[adapters[0]])
    variant, first = next(iter(combined.values()))
    config.variant, config.init_weights = variant, "bat" if variant == "bat-col" else True
    config.target_modules, config.exclude_modules = set(combined), None
    config.layers_to_transform = config.layers_pattern = None
    sizes = {name: _block_size(block) for name, (_, block) in combined.items()}
    config.r = _block_size(first)
    config.rank_pattern = {name: r for name, r in sizes.items() if r != config.r}
    config.mini_r = first.shape[1] if variant == "mini" else 1
    config.dropout, config.bias, config.modules_to_save = 0.0, "none", None
    config.inference_mode = True
    model.peft_config[adapter_name] = config
    try:
        model.inject_adapter(model.model, adapter_name)
    except Exception:
        del model.peft_config[adapter_name]
        raise
    for name, layer in model._bone_layers():
        if name in combined:
            layer.bone_block[adapter_name].data = combined[name][1]


def combine(where: str, layer: BoneLayer, factors: dict[str, float]) -> tuple[str, Tensor]:
    """Variant and block of the weighted sum of a layer's adapters.

    Linear in the blocks at equal variant and sizes. `bone` of block sizes r1 and r2 is `bone` of any common multiple:
    its delta repeats along the input with period r (a whole input is a period, too), and that of `mini` along the
    output as well.

    Raises:
        ConfigError: there is no such block.
    """
    blocks = {name: layer.bone_block[name].detach() for name in factors}
    kinds = {layer.bone_variant[name] for name in factors}
    shapes = {block.shape for block in blocks.values()}
    if len(kinds) == 1 and len(shapes) == 1:
        return kinds.pop(), _weighted_sum(blocks, factors)
    if kinds <= {"bone", "mini"}:
        r = min(math.lcm(*(block.shape[0] for block in blocks.values())), layer.in_features)
        wide = {n: shards.tile(shards.tile(b, layer.out_features).mT, r).mT for n, b in blocks.items()}
        return "bone", _weighted_sum(wide, factors)
    got = ", ".join(f"{n!r} is {layer.bone_variant[n]} with r={layer.bone_r[n]}" for n in factors)
    raise ConfigError(
        f"{where}: {got}; no single adapter is their sum. Activate them together (set_adapter) with set_scale instead"
    )


def _weighted_sum(blocks: dict[str, Tensor], factors: dict[str, float]) -> Tensor:
    total = sum(
        blocks[name].to(torch.promote_types(blocks[name].dtype, torch.float32)) * f for name, f in factors.items()
    )
    assert isinstance(total, Tensor)
    return total.to(next(iter(blocks.values())).dtype).contiguous()


def _block_size(block: Tensor) -> int:
    return block.shape[-1] if block.ndim == 3 else block.shape[0]


def _check_request(
    model: BoneModel, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
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
    saved = [n for n in adapters if n in model.peft_config and model.peft_config[n].modules_to_save]
    if saved:
        problems.append(f"adapters: {saved} have modules_to_save, of which there is no weighted sum")
    if problems:
        raise ConfigError("add_weighted_adapter: " + "; ".join(problems))
