"""BoneOwnForward: linear layers of hosts with a forward of their own, in which the weight is shifted."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flashbone.tuner.layers.kinds import LINEAR, TRANSPOSED
from flashbone.tuner.layers.layer import BoneLinear
from flashbone.tuner.layers.quantized import linear_kind
from flashbone.tuner.layers.shifts import by_rows, call_shifted, check_no_dropout
from flashbone.variants import Variant


class BoneOwnForward(BoneLinear):
    """A subclass of `nn.Linear` or Conv1D with a computation of its own: a router, a grouped projection."""

    converts_to_lora = False

    def _checked_variant(self, variant: Variant, dropout: float) -> Variant:
        check_no_dropout(self.get_base_layer(), dropout)
        return variant

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the base returns with its weight shifted by all active adapters."""

        return by_rows(self, x, lambda rows, names: call_shifted(self, names, (rows, *args), kwargs))


def has_own_forward(base: nn.Module) -> bool:
    """Whether the class of an unquantised linear layer overrides the matrix product."""
    is_linear = isinstance(base, (nn.Linear, Conv1D)) and linear_kind(base, None) in (LINEAR, TRANSPOSED)
    return is_linear and type(base).forward not in (nn.Linear.forward, Conv1D.forward)
