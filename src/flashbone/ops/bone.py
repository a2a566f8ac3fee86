"""The output shift of bone: `y + S(x) B`, one addmm onto the base's output."""

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone import shards


def bounded_sum(x: Float[Tensor, "*batch in"], r: int, divisor: int = 1) -> Float[Tensor, "*batch r"]:
    """`S(x) / divisor` in x's dtype; rounded to fp16 only after the division. Autograd keeps nothing of x."""
    s = shards.shard_sum(x, r)
    return s if divisor == 1 and s.dtype == x.dtype else (s / divisor).to(x.dtype)


def add_factored(
    y: Float[Tensor, "tokens out"], s: Float[Tensor, "tokens r"], B: Float[Tensor, "r out"], in_place: bool = False
) -> Float[Tensor, "tokens out"]:
    """`y + s B` in y's dtype. `in_place` overwrites y, which nobody else may hold and which must not be a view.

    Plain torch, no hand-written backward: of y's size autograd keeps nothing, only s and B. In place saves two passes
    over y (docs/tried.md).
    """
    if not s.dtype == B.dtype == y.dtype:
        s, B = s.to(y.dtype), B.to(y.dtype)
    return y.addmm_(s, B) if in_place else torch.addmm(y, s, B)
