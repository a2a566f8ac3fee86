"""The weight shift of bat-col: `W' = W + W D + D` by blocks, one batched GEMM, rebuilt in backward instead of kept.

`W.view(n_out, r * n_in, r)` needs no permutation: row (i, b) of matrix a is row i of block [a, b], and all of them are
multiplied by the same D_a from the right. An operator of its own (`flashbone::bat_col_linear`): under torch.compile a
traced one would keep W' from forward to backward, as a common subexpression. Gradients: docs/maths.md.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from flashbone import shards
from flashbone.ops.autocast import without_autocast


def weight_delta(W: Float[Tensor, "out in"], D: Float[Tensor, "n_out r r"]) -> Float[Tensor, "out in"]:
    """`W[a,b] D_a + D_a` for every block, in W's dtype (D is cast to it)."""
    return _shifted(W, D.to(W.dtype), with_base=False)


def shifted_weight(
    W: Float[Tensor, "out in"], blocks: Sequence[Tensor], with_base: bool = True
) -> Float[Tensor, "out in"]:
    """`sum_i (W D_i + D_i)`, plus W itself if `with_base`; a new tensor in W's dtype, which the blocks have, too."""
    total = _shifted(W, blocks[0], with_base)
    for D in blocks[1:]:
        total += _shifted(W, D, with_base=False)
    return total


def bat_col_linear(
    x: Float[Tensor, "tokens in"],
    W: Float[Tensor, "out in"],
    bias: Float[Tensor, "out"] | None,
    blocks: Sequence[Tensor],
    with_base: bool = True,
    composite: bool = False,
) -> Float[Tensor, "tokens out"]:
    """`x (W + sum_i (W D_i + D_i))^T + bias` in x's dtype; without W's own term if not `with_base`.

    W' is built in W's dtype. Backward holds one layer's W' and dW' at a time.

    Args:
        x: The input.
        W: The base's weight.
        bias: The base's bias.
        blocks: One D (n_out, r, r) or more, in W's dtype; they may differ in r.
        with_base: Whether the base's own product is part of it.
        composite: Plain torch operations instead of the operator, for torch.func's transforms; they keep W'.
    """
    run = _forward if composite else torch.ops.flashbone.bat_col_linear
    return run(x, W, bias, list(blocks), with_base)


def bat_col_linear_refetched(
    x: Float[Tensor, "tokens in"],
    fetch: Callable[[], Tensor],
    bias: Float[Tensor, "out"] | None,
    blocks: Sequence[Tensor],
    with_base: bool = True,
    composite: bool = False,
) -> Float[Tensor, "tokens out"]:
    """As `bat_col_linear` of the W (out, in) that `fetch()` returns; nothing of W is kept, backward fetches it anew.

    For weights that are gathered or dequantised to be read. W is a constant: it gets no gradient, and nobody may change
    it between forward and backward. The blocks may have any dtype.
    """
    if composite:
        W = fetch()
        return _forward(x, W, bias, [D.to(W.dtype) for D in blocks], with_base)
    return _Refetched.apply(x, fetch, bias, with_base, *blocks)  # pyright: ignore[reportReturnType]


def _shifted(W: Tensor, D: Tensor, with_base: bool) -> Tensor:
    r = D.shape[-1]
    blocks = shards.split_weight(W, r)  # (n_out, r, n_in, r)
    rows = blocks.flatten(1, 2)  # (n_out, r * n_in, r)
    product = torch.baddbmm(rows, rows, D) if with_base else torch.bmm(rows, D)
    product = product.view(blocks.shape).add_(D.unsqueeze(2))
    return shards.join_weight(product, *W.shape)


def _forward(x: Tensor, W: Tensor, bias: Tensor | None, blocks: Sequence[Tensor], with_base: bool) -> Tensor:
    if 2 * x.shape[0] < min(D.shape[-1] for D in blocks) and W.numel() > _SMALL:
        return _of_few_tokens(x, W, bias, blocks, with_base)
    return linear(x, shifted_weight(W, blocks, with_base).to(x.dtype), None if bias is None else bias.to(x.dtype))


# Weights of fewer entries are shifted as fast as anything else is called.
_SMALL = 1 << 16


def _of_few_tokens(x: Tensor, W: Tensor, bias: Tensor | None, blocks: Sequence[Tensor], with_base: bool) -> Tensor:
    """The same without W': `y_a = sum_b W[a,b] (D_a x_b) + D_a S(x)`. Costs two products with W's size for each token
    and block, where W' alone costs r."""
    dtype, (out_features, _) = x.dtype, W.shape
    W = W.to(dtype)
    y = linear(x, W) if with_base else x.new_zeros(x.shape[0], out_features)
    y = y if bias is None else y + bias.to(dtype)
    for D in blocks:
        r = D.shape[-1]
        D, x_b = D.to(dtype), shards.split(x, r)
        rotated = (x_b.flatten(0, 1) @ D.mT).view(len(D), x.shape[0], x_b.shape[1] * r)
        shift = torch.bmm(rotated, shards.split_weight(W, r).flatten(2).mT) + x_b.sum(1) @ D.mT
        y = y + shift.transpose(0, 1).flatten(1)[:, :out_features]
    return y


def _backward(
    grad: Tensor, x: Tensor, W: Tensor, blocks: Sequence[Tensor], with_base: bool, need: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x, W, the bias and each block; empty where `need` does not ask for it."""
    grads = [x.new_empty(0), W.new_empty(0), grad.new_empty(0), *(D.new_empty(0) for D in blocks)]
    if need[0]:
        grads[0] = grad @ shifted_weight(W, blocks, with_base).to(x.dtype)
    if need[1] or any(need[3:]):
        grad_shifted = (grad.mT @ x).to(W.dtype)
        if need[1]:
            grads[1] = _weight_grad(grad_shifted, blocks, with_base)
        for i, D in enumerate(blocks, 3):
            if need[i]:
                grads[i] = _block_grad(W, grad_shifted, D.shape[-1])
    if need[2]:
        grads[2] = grad.sum(0)
    return grads


def _block_grad(W: Tensor, grad_shifted: Tensor, r: int) -> Tensor:
    """`dD_a = sum_b (W[a,b]^T + I) dW'[a,b]`."""
    W_blocks, grad_blocks = shards.split_weight(W, r), shards.split_weight(grad_shifted, r)
    product = torch.bmm(W_blocks.flatten(1, 2).mT, grad_blocks.flatten(1, 2))
    return product + grad_blocks.sum(2)


def _weight_grad(grad_shifted: Tensor, blocks: Sequence[Tensor], with_base: bool) -> Tensor:
    """`dW[a,b] = dW'[a,b] (I + D_a^T)`, for a base weight that is trained along."""
    total = grad_shifted.clone() if with_base else torch.zeros_like(grad_shifted)
    for D in blocks:
        grad_blocks = shards.split_weight(grad_shifted, D.shape[-1])
        product = torch.bmm(grad_blocks.flatten(1, 2), D.mT)
        total = total + shards.join_weight(product.view(grad_blocks.shape), *grad_shifted.shape)
    return total


@torch.library.custom_op("flashbone::bat_col_linear", mutates_args=())
def _bat_col_linear(x: Tensor, W: Tensor, bias: Tensor | None, blocks: Sequence[Tensor], with_base: bool) -> Tensor:
    with without_autocast(x.device.type):
        return _forward(x, W, bias, blocks, with_base)


@_bat_col_linear.register_fake
def _(x: Tensor, W: Tensor, bias: Tensor | None, blocks: Sequence[Tensor], with_base: bool) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[0])


@torch.library.custom_op("flashbone::bat_col_linear_backward", mutates_args=())
def _bat_col_linear_backward(
    grad: Tensor, x: Tensor, W: Tensor, blocks: Sequence[Tensor], with_base: bool, need: Sequence[bool]
) -> list[Tensor]:
    with without_autocast(x.device.type):
        return [g.contiguous() for g in _backward(grad, x, W, blocks, with_base, need)]


@_bat_col_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, W: Tensor, blocks: Sequence[Tensor], with_base: bool, need: Sequence[bool]
) -> list[Tensor]:
    like = [x, W, grad.new_empty(grad.shape[1]), *blocks]
    return [t.new_empty(t.shape if needed else 0) for t, needed in zip(like, need, strict=True)]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, W, bias, blocks, ctx.with_base = inputs
    ctx.save_for_backward(x, W, *blocks)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, W, *blocks = ctx.saved_tensors
    need_x, need_W, need_bias, need_blocks, _ = ctx.needs_input_grad
    need = [need_x, need_W, need_bias, *need_blocks]
    # With create_graph the plain operations are called, which autograd can differentiate once more.
    run = _backward if torch.is_grad_enabled() else torch.ops.flashbone.bat_col_linear_backward
    got = run(grad, x, W, blocks, ctx.with_base, need)
    grads = [g if needed else None for g, needed in zip(got, need, strict=True)]
    if need_bias:
        grads[2] = got[2].to(ctx.bias_dtype)
    return grads[0], grads[1], grads[2], grads[3:], None


_bat_col_linear.register_autograd(_autograd, setup_context=_setup_context)


class _Refetched(torch.autograd.Function):
    """`bat_col_linear_refetched`: keeps x, the blocks and the way to W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fetch: Callable[[], Tensor], bias: Tensor | None, with_base: bool, *blocks: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *blocks)
        ctx.fetch, ctx.with_base, ctx.bias_dtype = fetch, with_base, None if bias is None else bias.dtype
        W = fetch()
        with without_autocast(x.device.type):
            return _forward(x, W, bias, [D.to(W.dtype) for D in blocks], with_base)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *blocks = ctx.saved_tensors
        need_x, _, need_bias, _, *need_blocks = ctx.needs_input_grad
        W = ctx.fetch().detach()
        need = [need_x, False, need_bias, *need_blocks]
        with without_autocast(x.device.type):
            grads = _backward(grad, x, W, [D.to(W.dtype) for D in blocks], ctx.with_base, need)
        grad_blocks = [g.to(D.dtype) if n else None for g, D, n in zip(grads[3:], blocks, need_blocks, strict=True)]
        grad_bias = grads[2].to(ctx.bias_dtype) if need_bias else None
        return grads[0] if need_x else None, None, grad_bias, None, *grad_blocks
