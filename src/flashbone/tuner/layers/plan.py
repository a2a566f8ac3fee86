"""Plans: what the next calls of a layer run, within one call of its model.

In generation a layer is called for every token, and decides the same each time. A plan is what it decided, as one
function of x. It lives among what the call of the model keeps, and so ends with that call; until then it holds as long
as the layer's state is the one that it was made in. `CallPlan.holds` lists that state, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashbone.ops import transforms
from flashbone.ops.cache import NOTHING, Kept
from flashbone.ops.moves import Moves
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.kinds import is_plain


class CallPlan:
    """A function of x (tokens, in), and the state of a layer with one adapter in which it is the layer's call."""

    def __init__(self, layer: Any, name: str, moves: Moves, run: Callable[[Tensor], Tensor], too_many: int) -> None:
        active, base = layer._active_adapter, layer.base_layer
        self.run, self.dtype, self.too_large = run, moves.x.dtype, too_many * layer.in_features
        self.name, self.active = name, active if isinstance(active, str) else list(active)
        self.block, self.scale, self.variant = layer.bone_block[name], layer.bone_scale[name], layer.bone_variant[name]
        self.base, self.weight, self.bias = base, base._parameters.get("weight"), base._parameters.get("bias")

    def holds(self, layer: Any, x: Tensor) -> bool:
        """Whether the layer, which is in inference, is in the same state, and x of the same kind."""
        modules, name = layer._modules, self.name
        base = modules["base_layer"]
        parameters = base._parameters
        return (
            type(x) is Tensor
            and x.dtype == self.dtype
            and x.numel() < self.too_large
            and layer._active_adapter == self.active
            and modules["bone_block"]._parameters.get(name) is self.block
            and layer.bone_scale.get(name) == self.scale
            and layer.bone_variant.get(name) is self.variant
            and base is self.base
            and parameters.get("weight") is self.weight
            and parameters.get("bias") is self.bias
            and is_plain(base)
            and layer.backend == "torch"
            and not (layer._disable_adapters or layer.merged_adapters)
            and not (torch._C._is_any_autocast_enabled() or transforms.are_active())
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if x.ndim == 2:
            return self.run(x)
        y = self.run(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])


def keep_plan(layer: Any, names: list[str], moves: Moves, base: Callable[[Tensor], Tensor], kept: Kept | None) -> None:
    """After a call of a layer with these adapters and a plain base: keep its plan, where a second call shows that more
    are to come."""
    if kept is None or kept is NOTHING or len(names) > 1 or not kept.is_worth_keeping("plan"):
        return
    if not offloading.is_materialized(layer.bone_block[names[0]]):
        return
    if (planned := moves.planned(base)) is not None:
        kept.plan = CallPlan(layer, names[0], moves, *planned)
