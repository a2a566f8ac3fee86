"""BoneOutProj: `out_proj` of `nn.MultiheadAttention`, whose weight is read and which is never called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashbone.errors import ConfigError
from flashbone.tuner.layer import BoneLinear
from flashbone.tuner.shifts import acting, check_is_there, shifted_weight, terms
from flashbone.variants import Variant


class BoneOutProj(BoneLinear):
    """The projection after `nn.MultiheadAttention`, with adapters: its `weight` is `W + sum of scale * delta(W)`.

    The attention hands weight and bias to its own functions, and so does the fast path of nn.TransformerEncoderLayer.
    """

    converts_to_lora = False

    def _fitted(self, variant: Variant, dropout: float) -> Variant:
        if dropout:
            raise ConfigError(
                "nn.MultiheadAttention reads the weight of its out_proj and never calls it, so that"
                f" dropout={dropout} has no place; use dropout=0, or put the layer into exclude_modules"
            )
        return variant

    @property
    def weight(self) -> Any:
        """The base's weight with all active adapters in it; gradients reach their blocks."""
        base: Any = self.get_base_layer()
        names = acting(self)
        if not names:
            return base.weight
        return shifted_parameter(self, names)


def shifted_parameter(layer: BoneLinear, names: list[str]) -> Tensor:
    """What the layer's parameter becomes with these adapters, as it is stored; made anew in each call, since it is as
    large as the parameter.

    Raises:
        ConfigError: a host takes the parameter away between calls.
    """
    check_is_there(layer)
    base = layer.get_base_layer()
    return layer._kind.stored(shifted_weight(layer._kind.weight(base), terms(layer, names)), base)
