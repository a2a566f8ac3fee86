"""The output shift of mini and bat-row: `y + tile(t)`, one pass over the base's output."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from flashbone import shards


class _AddTiled_(Function):
    """In place on y. Written by hand because autograd's own in-place addition to a view of y would clone gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.width, ctx.dtype = t.shape[-1], t.dtype
        return _add_tiles_(y, t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        need_y, need_t = ctx.needs_input_grad
        return grad if need_y else None, shards.shard_sum(grad, ctx.width).to(ctx.dtype) if need_t else None


def _add_tiles_(y: Tensor, t: Tensor) -> Tensor:
    k = t.shape[-1]
    n, tail = y.shape[-1] // k, y.shape[-1] % k
    if tail:
        y[..., n * k :].add_(t[..., :tail])
    (y[..., : n * k] if tail else y).view(y.shape[0], n, k).add_(t.unsqueeze(-2))
    return y


def add_tiles(
    y: Float[Tensor, "tokens out"], t: Float[Tensor, "tokens k"], in_place: bool = False
) -> Float[Tensor, "tokens out"]:
    """`y + tile(t)` in y's dtype. `in_place` overwrites y, which nobody else may hold and which must not be a view;
    not under torch.compile, nor in torch.func's transforms."""
    t = t if t.dtype == y.dtype else t.to(y.dtype)
    if not in_place:
        return shards.add_tiled(y, t)
    return _AddTiled_.apply(y, t) if torch.is_grad_enabled() else _add_tiles_(y, t)
