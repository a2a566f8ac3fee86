"""The output shift of bone: `y + S(x) B`, one addmm onto the base's output."""

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone import shards
from flashbone.ops.inputs import flat

_LACKS_BF16_PRODUCTS = not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def bounded_sum(x: Float[Tensor, "*batch in"], r: int, divisor: int = 1) -> Float[Tensor, "tokens r"]:
    """`S(x) / divisor` in x's dtype; rounded to fp16 only after the division. Autograd keeps nothing of x."""
    n = x.shape[-1] // r
    if x.shape[-1] % r or x.dtype == torch.float16:
        return (shards.shard_sum(flat(x), r) / divisor).to(x.dtype)
    s = x.reshape(-1, n, r).sum(1)  # apart from shard_sum: a decoding step feels each of its lines
    return s if divisor == 1 else s / divisor


def add_factored(
    y: Float[Tensor, "tokens out"], s: Float[Tensor, "tokens r"], B: Float[Tensor, "r out"], in_place: bool = False
) -> Float[Tensor, "tokens out"]:
    """`y + s B` in y's dtype. `in_place` overwrites y, which nobody else may hold and which must not be a view.

    Plain torch, no hand-written backward: of y's size autograd keeps nothing, only s and B. In place saves two passes
    over y (docs/tried.md).
    """
    if not s.dtype == B.dtype == y.dtype:
        s, B = s.to(y.dtype), B.to(y.dtype)
    if not in_place:
        return torch.addmm(y, s, B)
    if (
        y.dtype == torch.bfloat16
        and _LACKS_BF16_PRODUCTS
        and len(y) == 1
        and not (y.is_cuda or torch.is_grad_enabled())
    ):
        y[0].addmv_(B.mT, s[0])  # a GEMM of one row takes twenty times as long there; elsewhere 0.6 of this
        return y
    return y.addmm_(s, B)
