"""Sequences cut into chunks of tokens, and back."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def cut(x: Float[Tensor, "batch tokens heads N"], chunk: int, dtype: torch.dtype) -> Float[Tensor, "rows chunks c N"]:
    """Chunks of c tokens in `dtype`, a row for each head of each sequence; the last one is filled up with zeros."""
    filled = -x.shape[1] % chunk
    x = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, 0, 0, filled)) if filled else x.to(dtype)
    return rearrange(x, "batch (chunks c) heads N -> (batch heads) chunks c N", c=chunk).contiguous()


def joined(x: Float[Tensor, "rows chunks c N"], heads: int, tokens: int) -> Float[Tensor, "batch tokens heads N"]:
    """The inverse of `cut`; the padding is dropped."""
    return rearrange(x, "(batch heads) chunks c N -> batch (chunks c) heads N", heads=heads)[:, :tokens]


def product(
    x: Float[Tensor, "rows chunks i j"], y: Float[Tensor, "rows chunks j l"], plus: Tensor | None = None
) -> Float[Tensor, "rows chunks i l"]:
    """x y, or plus + x y, chunk by chunk."""
    shape = x.shape[:2]
    if plus is None:
        return torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, shape)
    return torch.baddbmm(plus.flatten(0, 1), x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, shape)
