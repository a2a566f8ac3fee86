"""BoneOutProj: `out_proj` of `nn.MultiheadAttention`, whose weight is read and which is never called."""

from __future__ import annotations

from typing import Any

from flashbone.errors import ConfigError
from flashbone.tuner.layers.layer import BoneLinear
from flashbone.tuner.layers.shifts import acting, shifted_parameter
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
