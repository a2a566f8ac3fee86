"""The weight shift of bat-col: `W' = W + W D + D` by blocks, one batched GEMM, rebuilt in backward instead of kept.

`W.view(n_out, r * n_in, r)` needs no permutation: row (i, b) of matrix a is row i of block [a, b], and all of them are
multiplied by the same D_a from the right. Derivation of the gradients: docs/maths.md.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from flashbone import shards


def weight_delta(W: Float[Tensor, "out in"], D: Float[Tensor, "n_out r r"]) -> Float[Tensor, "out in"]:
    """`W[a,b] D_a + D_a` for every block, in W's dtype (D is cast to it)."""
    return _shifted(W, D.to(W.dtype), with_base=False)


def shifted_weight(
    W: Float[Tensor, "out in"], blocks: Sequence[Tensor], scales: Sequence[float], with_base: bool
) -> Float[Tensor, "out in"]:
    """`sum_i scale_i (W D_i + D_i)`, plus W itself if `with_base`; a new tensor, in W's dtype."""
    total = None
    for D, scale in zip(blocks, scales, strict=True):
        D = (D if scale == 1 else D * scale).to(W.dtype)
        if total is None:
            total = _shifted(W, D, with_base)
        else:
            total += _shifted(W, D, with_base=False)
    assert total is not None, "called without a block"
    return total


def _shifted(W: Tensor, D: Tensor, with_base: bool) -> Tensor:
    r = D.shape[-1]
    blocks = shards.split_weight(W, r)  # (n_out, r, n_in, r)
    rows = blocks.flatten(1, 2)  # (n_out, r * n_in, r)
    product = torch.baddbmm(rows, rows, D) if with_base else torch.bmm(rows, D)
    product = product.view(blocks.shape).add_(D.unsqueeze(2))
    return shards.join_weight(product, *W.shape)


class _BatColLinear(Function):
    """`y = x W'^T + bias`; keeps x, W and the blocks, all of which exist anyway, and rebuilds W' in backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x, W, bias, with_base, scales, *blocks):
        ctx.save_for_backward(x, W, *blocks)
        ctx.with_base, ctx.scales = with_base, scales  # pyright: ignore[reportAttributeAccessIssue]
        with torch.autocast(x.device.type, enabled=False):
            shifted = shifted_weight(W, blocks, scales, with_base).to(x.dtype)
            return torch.nn.functional.linear(x, shifted, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, *blocks = ctx.saved_tensors
        need_x, need_W, need_bias, _, _, *need_blocks = ctx.needs_input_grad
        grad_x = grad_W = grad_bias = None
        grad_blocks: list[Tensor | None] = [None] * len(blocks)
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                grad_x = grad @ shifted_weight(W, blocks, ctx.scales, ctx.with_base).to(x.dtype)
            flat_grad = grad.reshape(-1, grad.shape[-1])
            if need_bias:
                grad_bias = flat_grad.sum(0)
            if need_W or any(need_blocks):
                grad_shifted = (flat_grad.mT @ x.reshape(-1, x.shape[-1])).to(W.dtype)
                if need_W:
                    grad_W = _weight_grad(grad_shifted, blocks, ctx.scales, ctx.with_base)
                for i, (D, scale) in enumerate(zip(blocks, ctx.scales, strict=True)):
                    if need_blocks[i]:
                        grad_blocks[i] = (scale * _block_grad(W, grad_shifted, D.shape[-1])).to(D.dtype)
        return grad_x, grad_W, grad_bias, None, None, *grad_blocks


def _block_grad(W: Tensor, grad_shifted: Tensor, r: int) -> Tensor:
    """`dD_a = sum_b (W[a,b]^T + I) dW'[a,b]`."""
    W_blocks, grad_blocks = shards.split_weight(W, r), shards.split_weight(grad_shifted, r)
    product = torch.bmm(W_blocks.flatten(1, 2).mT, grad_blocks.flatten(1, 2))
    return product + grad_blocks.sum(2)


def _weight_grad(grad_shifted: Tensor, blocks: Sequence[Tensor], scales: Sequence[float], with_base: bool) -> Tensor:
    """`dW[a,b] = dW'[a,b] (I + D_a^T)`, for a base weight that is trained along."""
    total = grad_shifted.clone() if with_base else torch.zeros_like(grad_shifted)
    for D, scale in zip(blocks, scales, strict=True):
        grad_blocks = shards.split_weight(grad_shifted, D.shape[-1])
        product = torch.bmm(grad_blocks.flatten(1, 2), (D * scale).to(grad_shifted.dtype).mT)
        total += shards.join_weight(product.view(grad_blocks.shape), *grad_shifted.shape)
    return total


def bat_col_linear(
    x: Float[Tensor, "*batch in"],
    W: Float[Tensor, "out in"],
    bias: Float[Tensor, "out"] | None,
    blocks: Sequence[Tensor],
    scales: Sequence[float],
    with_base: bool = True,
) -> Float[Tensor, "*batch out"]:
    """`x (W + sum_i scale_i (W D_i + D_i))^T + bias` in x's dtype; without W's own term if not `with_base`.

    W' is built in W's dtype. Backward holds one layer's W' and dW' at a time; gradients of the blocks arrive in their
    own dtype. The blocks may differ in r.
    """
    return _BatColLinear.apply(x, W, bias, with_base, tuple(scales), *blocks)
