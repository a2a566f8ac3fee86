"""BoneConv: convolutions with adapters. W is the unfolded weight, (out, in / groups * positions of the kernel)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashbone import shards
from flashbone.ops.autocast import without_autocast
from flashbone.ops.moves import Moves
from flashbone.tuner.layers.kinds import BaseKind, is_plain
from flashbone.tuner.layers.layer import BoneLinear
from flashbone.tuner.layers.shifts import (
    by_rows,
    call_shifted,
    check_no_dropout,
    shifted_weight,
    terms,
)
from flashbone.variants import Variant
from flashbone.variants.merged import Term

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS = tuple(kind.forward for kind in CONVOLUTIONS)
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvKind(BaseKind):
    """W is the weight flattened from its second axis on."""

    def sizes(self, module: Any) -> tuple[int, int]:
        shape = getattr(module.weight, "ds_shape", module.weight.shape)
        return shape[0], math.prod(shape[1:])

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def stored(self, W: Tensor, module: Any) -> Tensor:
        return W.reshape(getattr(module.weight, "ds_shape", module.weight.shape))


CONV = ConvKind()


class BoneConv(BoneLinear):
    """An `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with adapters: a linear layer on patches of its input."""

    converts_to_lora = False

    def _kind_of(self, base: nn.Module) -> BaseKind:
        return CONV

    def _checked_variant(self, variant: Variant, dropout: float) -> Variant:
        base = self.get_base_layer()
        if not _calls_one_convolution(base):
            check_no_dropout(base, dropout)
        return variant

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output with the shifts of all active adapters; x (batch, channels, ...) or without the batch."""
        return by_rows(self, x, lambda rows, names: self._run(rows, names, *args, **kwargs))

    def _run(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        if args or kwargs or not _calls_one_convolution(base):
            return call_shifted(self, names, (x, *args), kwargs)
        if not names:
            return self.base_layer(x)
        if _is_pointwise(base) and is_plain(self.base_layer, _FORWARDS):
            return self._as_linear(x, names)
        return self._with_shifts(x, names)

    def _as_linear(self, x: Tensor, names: list[str]) -> Tensor:
        """A 1 x 1 kernel: the channels at each position that the stride keeps are a row for a linear layer."""
        base: Any = self.get_base_layer()
        strides = base.stride
        kept_x = x[(..., *(slice(None, None, stride) for stride in strides))] if max(strides) > 1 else x
        channels = -1 - len(strides)
        rows = kept_x.movedim(channels, -1)
        moves = Moves(rows, self._kept(x), self.backend)
        for name, (variant, block, scale) in zip(names, terms(self, names), strict=True):
            variant.move(moves, self._with_dropout(name, rows) if self.training else rows, block, scale)
        y = moves.run(lambda tokens: F.linear(tokens, *self._weight_and_bias()), self._weight_and_bias)
        return _laid_out_like(y.movedim(-1, channels), x)

    def _with_shifts(self, x: Tensor, names: list[str]) -> Tensor:
        """bone and mini shift the output by their factors, the other variants shift the weight."""
        base: Any = self.get_base_layer()
        factors: dict[tuple[int, int], tuple[Tensor, Any]] = {}
        at_base: list[Term] = []
        separate: list[tuple[Tensor, Term]] = []
        for name, term in zip(names, terms(self, names), strict=True):
            variant, block, scale = term
            adapter_x = self._with_dropout(name, x) if self.training else x
            if base.groups == 1 and not variant.delta_depends_on_weight:
                B = shards.tile(block, self.out_features) * scale
                key = id(adapter_x), B.shape[0]
                factors[key] = adapter_x, (factors[key][1] + B if key in factors else B)
            elif adapter_x is x:
                at_base.append(term)
            else:
                separate.append((adapter_x, term))
        if at_base and is_plain(self.base_layer, _FORWARDS):
            W = shifted_weight(self._weight_and_bias()[0], at_base)
            y = base._conv_forward(x, self.base_kind.stored(W, base), base.bias)
        else:
            separate += [(x, term) for term in at_base]
            y = self.base_layer(x)
        for adapter_x, term in separate:
            (variant, block, scale), W = term, self._weight_and_bias()[0]
            with without_autocast(W.device.type):
                delta = (variant.delta(W, block) * scale).to(W.dtype)
            y = y + base._conv_forward(adapter_x, self.base_kind.stored(delta, base), None)
        for adapter_x, B in factors.values():
            y = y + self._factored(adapter_x, B).to(y.dtype)
        return y

    def _factored(self, x: Tensor, B: Tensor) -> Tensor:
        """`S(patches of x) B`: to r channels with the constant kernel `[I I ... I]`, then 1 x 1 with B."""
        base: Any = self.get_base_layer()
        r, n = B.shape[0], shards.count(self.in_features, B.shape[0])
        # In fp16 a sum of many shards may overflow: divide by a power of two, which rounds nothing.
        unit = 1 << (n - 1).bit_length() if torch.float16 in (x.dtype, base.weight.dtype) else 1
        ones = shards.tile(torch.eye(r, dtype=x.dtype, device=x.device) / unit, self.in_features)
        s = base._conv_forward(x, ones.view(r, *getattr(base.weight, "ds_shape", base.weight.shape)[1:]), None)
        pointwise = _FUNCTIONS[len(base.kernel_size)]
        return pointwise(s, (B * unit).to(x.dtype).mT.reshape(self.out_features, r, *[1] * len(base.kernel_size)))


def _calls_one_convolution(base: Any) -> bool:
    """Whether the class has torch's forward; hosts that move weights replace only that of the instance."""
    return type(base).forward in _FORWARDS


def _is_pointwise(base: Any) -> bool:
    return max(base.kernel_size) == base.groups == 1 and (isinstance(base.padding, str) or not any(base.padding))


def _laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format that a convolution returns for x: contiguous, or channels last as in x."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return y.contiguous(memory_format=torch.channels_last)
    return y.contiguous()
