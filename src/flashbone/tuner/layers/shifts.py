"""Shifting a base's weight itself, for layers that are not a product with the rows of their input."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flashbone import shards
from flashbone.errors import ConfigError
from flashbone.ops.autocast import without_autocast
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.adapted import AdaptedLayer
from flashbone.variants.merged import Term


def adapters_to_apply(layer: AdaptedLayer) -> list[str]:
    """Names of the adapters for a call: none while merged or disabled. Disabling unmerges.

    Raises:
        ConfigError: the call names an adapter for each row, and all rows share one weight.
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
    return [] if layer.disable_adapters or layer.merged else layer.active_here()


def by_rows(layer: AdaptedLayer, x: Tensor, run: Callable[[Tensor, list[str]], Tensor]) -> Tensor:
    """`run(x, names)` with the adapters to apply; with an adapter for each row, on the rows of each adapter in turn.

    Raises:
        ConfigError: there is an adapter for each row, and adapters are merged.
        ShapeError: x has another number of rows.
    """
    rows = layer.row_names
    if rows is None or layer.disable_adapters:
        return run(x, adapters_to_apply(layer))
    layer.check_rows()
    groups = rows.groups(len(x))
    x, end = rows.sorted(x), max((group.start + group.size for group in groups), default=0)
    parts = [run(x.narrow(0, g.start, g.size), [g.name] if g.name in layer.bone_block else []) for g in groups]
    if end < len(x) or not parts:
        parts.append(run(x[end:], []))
    return rows.restored(torch.cat(parts))


def terms(layer: AdaptedLayer, names: list[str]) -> list[Term]:
    """Variant, block and scale of each adapter."""
    return [(layer.bone_variant[name], layer.block_of(name), layer.bone_scale[name]) for name in names]


def shifted_weight(W: Tensor, adapters: list[Term]) -> Tensor:
    """`W + sum of scale * delta(W)` in W's dtype, (out, in) or a stack of experts; gradients reach every block.

    The delta of bone and mini repeats along the input with period r, so no delta as large as W is made.
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


def shifted_parameter(layer: AdaptedLayer, names: list[str]) -> Tensor:
    """The layer's parameter with these adapters, as the base stores it. Not kept: it is as large as the parameter.

    Raises:
        ConfigError: see `check_not_offloaded`.
    """
    check_not_offloaded(layer)
    base, kind = layer.get_base_layer(), layer.base_kind
    with alone(layer):
        W = kind.weight(base)
    return kind.stored(shifted_weight(W, terms(layer, names)), base)


def alone(layer: AdaptedLayer) -> AbstractContextManager:
    """Within the block no other thread's call has a shifted value in the place of the layer's parameter."""
    return nullcontext() if torch.compiler.is_compiling() else layer.turn


def check_no_dropout(base: nn.Module, dropout: float) -> None:
    """Check the dropout for a base that overrides the forward of its kind.

    Raises:
        ConfigError: it is not 0.
    """
    if dropout:
        raise ConfigError(
            f"{type(base).__name__} has a forward of its own, in which only its weight can be shifted, so"
            f" dropout={dropout} cannot be applied; use dropout=0, or leave the layer out"
        )


def check_not_offloaded(layer: AdaptedLayer) -> None:
    """
    Raises:
        ConfigError: a host shards or offloads the base's weight, and would replace a shifted one by its own.
    """
    base = layer.get_base_layer()
    if offloading.is_sharded_or_offloaded(base):
        raise ConfigError(
            f"the weight of this {type(base).__name__} is sharded or offloaded, and {type(layer).__name__} has to shift"
            " it before the layer is called; keep the layer where it computes, or leave it out"
        )


def call_shifted(layer: AdaptedLayer, names: list[str], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call the wrapped module with the adapted parameter shifted by these adapters, for this call only. Calls of other
    threads wait, those without adapters, too."""
    with alone(layer):
        if not names:
            return layer.base_layer(*args, **kwargs)
        path, inner = layer.base_kind.parameter_name, layer.base_layer
        while hasattr(inner, "base_layer"):  # adapters of other layers or methods inside this one
            path, inner = f"base_layer.{path}", cast(nn.Module, inner.base_layer)
        shifted = {path: shifted_parameter(layer, names)}
        return functional_call(layer.base_layer, shifted, args, kwargs, tie_weights=False)
