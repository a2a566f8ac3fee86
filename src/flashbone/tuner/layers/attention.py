"""BoneOutProj: `out_proj` of `nn.MultiheadAttention`, which reads its weight and never calls it."""

from __future__ import annotations

from typing import Any

from flashbone.errors import ConfigError
from flashbone.tuner.layers.layer import BoneLinear
from flashbone.tuner.layers.shifts import adapters_to_apply, shifted_parameter
from flashbone.variants import Variant


class BoneOutProj(BoneLinear):
    """The projection after `nn.MultiheadAttention`, with adapters: its `weight` is `W + sum of scale * delta(W)`.

    The attention passes weight and bias to functions of torch, and so does the fast path of nn.TransformerEncoderLayer.
    """

    converts_to_lora = False

    def _checked_variant(self, variant: Variant, dropout: float) -> Variant:
        if dropout:
            raise ConfigError(
                "nn.MultiheadAttention reads the weight of its out_proj and never calls it, so"
                f" dropout={dropout} cannot be applied; use dropout=0, or put the layer into exclude_modules"
            )
        return variant

    @property
    def weight(self) -> Any:
        """The base's weight with all active adapters; gradients reach their blocks."""
        names = adapters_to_apply(self)
        return shifted_parameter(self, names) if names else self.base_parameter()
