"""The shift of a base's weight as a new weight, for layers that are no product with the rows of their input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flashbone import shards, variants
from flashbone.errors import ConfigError
from flashbone.ops.autocast import without_autocast
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.layer import BoneLayer, BoneLinear

Term = tuple[variants.Variant, Tensor, float]


def acting(layer: BoneLayer) -> list[str]:
    """Names of the adapters that take part in a call: none while merged or disabled, which takes a merge back.

    Raises:
        ConfigError: the call has an adapter for each row, and the weight is one for all of them.
    """
    if layer.row_names is not None and not layer.disable_adapters:
        if any(name in layer.bone_block for name in layer.row_names.names):
            raise ConfigError(
                f"adapter_names: {type(layer).__name__} shifts one weight for all rows of a batch; run one batch for"
                " each adapter, with set_adapter"
            )
        return []
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    return [] if layer.disable_adapters or layer.merged else layer._active()


def by_rows(layer: BoneLayer, x: Tensor, run: Callable[[Tensor, list[str]], Tensor]) -> Tensor:
    """`run(x, names)` with the adapters that act; where each row has its own, for the rows of each by themselves.

    Raises:
        ConfigError: each row has its own adapter, and adapters stand merged.
        ShapeError: x has another number of rows.
    """
    rows = layer.row_names
    if rows is None or layer.disable_adapters:
        return run(x, acting(layer))
    if layer.merged:
        raise ConfigError("adapter_names: adapters stand merged, so that no row can be without; unmerge them first")
    groups = rows.groups(len(x))
    x, end = rows.sorted(x), max((group.start + group.size for group in groups), default=0)
    parts = [run(x.narrow(0, g.start, g.size), [g.name] if g.name in layer.bone_block else []) for g in groups]
    if end < len(x) or not parts:
        parts.append(run(x[end:], []))
    return rows.restored(torch.cat(parts))


def terms(layer: BoneLinear, names: list[str]) -> list[Term]:
    """Variant, block and scale of each."""
    return [(layer.bone_variant[name], layer._block(name), layer.bone_scale[name]) for name in names]


def shifted_weight(W: Tensor, adapters: list[Term]) -> Tensor:
    """`W + sum of scale * delta(W)` in W's dtype, (out, in) or one for each expert; gradients reach every block.

    The delta of bone and mini repeats along the input with period r: no delta as large as W is made.
    """
    total = W
    with without_autocast(W.device.type):
        for variant, block, scale in adapters:
            if variant.delta_depends_on_weight:
                total = total + (variant.delta(W, block) * scale).to(W.dtype)
            else:
                period = variant.delta(W[..., : block.shape[-2]], block) * scale
                total = shards.add_tiled(total, period.to(W.dtype))
    return total


def shifted_parameter(layer: BoneLinear, names: list[str]) -> Tensor:
    """What the layer's parameter becomes with these adapters, as it is stored; made anew in each call, since it is as
    large as the parameter.

    Raises:
        ConfigError: a host takes the parameter away between calls.
    """
    check_is_there(layer)
    base = layer.get_base_layer()
    return layer._kind.stored(shifted_weight(layer._kind.weight(base), terms(layer, names)), base)


def refuse_dropout_in_own_forward(base: nn.Module, dropout: float) -> None:
    """For a base whose forward is not that of its kind.

    Raises:
        ConfigError: there is dropout.
    """
    if dropout:
        raise ConfigError(
            f"{type(base).__name__} has a forward of its own, in which only its weight can be shifted, so that"
            f" dropout={dropout} has no place; use dropout=0, or leave the layer out"
        )


def weight_delta(W: Tensor, adapters: list[Term]) -> Tensor:
    """`sum of scale * delta(W)` in W's dtype; a new tensor."""
    with without_autocast(W.device.type):
        deltas = [(variant.delta(W, block) * scale).to(W.dtype) for variant, block, scale in adapters]
        return sum(deltas[1:], deltas[0])


def check_is_there(layer: BoneLayer) -> None:
    """
    Raises:
        ConfigError: a host takes the base's weight away between calls, and would put its own over a shifted one.
    """
    base = layer.get_base_layer()
    if offloading.comes_and_goes(base):
        raise ConfigError(
            f"the weight of this {type(base).__name__} is sharded or offloaded, and {type(layer).__name__} has to shift"
            " it before the layer is called; keep the layer where it computes, or leave it out"
        )


def call_with(layer: BoneLayer, parameter: str, value: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A call of what lies inside the layer, with another value of one of the base's parameters for this call.

    Raises:
        ConfigError: see `check_is_there`.
    """
    check_is_there(layer)
    path = "base_layer." * _depth(layer) + parameter
    return functional_call(layer.base_layer, {path: value}, args, kwargs, tie_weights=False)


def _depth(layer: BoneLayer) -> int:
    """How many adapters of other layers or methods lie between the layer and its base."""
    count, inner = 0, layer.base_layer
    while hasattr(inner, "base_layer"):
        count, inner = count + 1, cast(nn.Module, inner.base_layer)
    return count
