"""The input shift of bat-row: `z_b = x_b D_b^T`, one batched GEMM over the input shards. No weight is read.

An operator of its own (`flashbone::shift_input`) with a hand-written backward, which adds up the gradients of x in one
pass and keeps x and D only. Derivation: docs/maths.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from flashbone import shards
from flashbone.ops.autocast import without_autocast


def shift_input(
    x: Float[Tensor, "tokens in"],
    D: Float[Tensor, "n_in r r"],
    base_x: Float[Tensor, "tokens in"] | None = None,
    composite: bool = False,
) -> tuple[Float[Tensor, "tokens in"], Float[Tensor, "tokens r"]]:
    """`base_x + z` (None: `x + z`), and `sum_b z_b`, with `z_b = x_b D_b^T`; x, D and base_x in one dtype.

    The whole output shift of the variant is `tile(sum_b z_b)`. The ragged tail is multiplied on its own, so that no
    padded copy of x exists; its z is as wide as a shard, and only its front shifts x.

    Args:
        x: What the adapter sees.
        D: The blocks.
        base_x: What the base is to see, shifted by others already.
        composite: Plain torch operations instead of the operator, for torch.func's transforms.
    """
    return _forward(x, D, base_x) if composite else torch.ops.flashbone.shift_input(x, D, base_x)


def _by_shard(t: Tensor) -> Tensor:
    """(tokens, n, r) seen as (n, tokens, r): the batch of the GEMM is the shard, and no copy is made."""
    return t.transpose(0, 1)


def _forward(x: Tensor, D: Tensor, base_x: Tensor | None) -> tuple[Tensor, Tensor]:
    whole, tail = shards.full_and_tail(x, D.shape[-1])
    base_whole, base_tail = (whole, tail) if base_x is None else shards.full_and_tail(base_x, D.shape[-1])
    z = torch.bmm(_by_shard(whole), (D[: whole.shape[1]] if tail.shape[-1] else D).mT)
    shifted, z_sum = (base_whole + _by_shard(z)).flatten(-2), z.sum(0)
    if width := tail.shape[-1]:
        z_tail = tail @ D[-1, :, :width].mT
        shifted, z_sum = torch.cat([shifted, base_tail + z_tail[:, :width]], -1), z_sum + z_tail
    return shifted, z_sum


def _backward(
    grad: Tensor, grad_sum: Tensor, x: Tensor, D: Tensor, x_is_base: bool, need_x: bool, need_D: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x (with the base's share if it is what the base sees) and D; empty where not needed."""
    whole, tail = shards.full_and_tail(x, D.shape[-1])
    grad_whole, grad_tail = shards.full_and_tail(grad, D.shape[-1])
    width, missing = tail.shape[-1], D.shape[-1] - tail.shape[-1]
    grad_z = _by_shard(grad_whole + grad_sum.unsqueeze(1))
    grad_z_tail = grad_sum + pad(grad_tail, (0, missing))
    grad_x, grad_D = x.new_empty(0), D.new_empty(0)
    if need_x:
        through_z = _by_shard(torch.bmm(grad_z, D[: len(grad_z)]))
        grad_x = (grad_whole + through_z if x_is_base else through_z).flatten(-2)
        if width:
            through_z = grad_z_tail @ D[-1, :, :width]
            grad_x = torch.cat([grad_x, grad_tail + through_z if x_is_base else through_z], -1)
    if need_D:
        grad_D = torch.bmm(grad_z.mT, _by_shard(whole))
        if width:
            grad_D = torch.cat([grad_D, pad(grad_z_tail.mT @ tail, (0, missing)).unsqueeze(0)])
    return grad_x, grad_D


@torch.library.custom_op("flashbone::shift_input", mutates_args=())
def _shift_input(x: Tensor, D: Tensor, base_x: Tensor | None) -> tuple[Tensor, Tensor]:
    with without_autocast(x.device.type):
        shifted, z_sum = _forward(x, D, base_x)
        return shifted.contiguous(), z_sum


@_shift_input.register_fake
def _(x: Tensor, D: Tensor, base_x: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], D.shape[-1])


@torch.library.custom_op("flashbone::shift_input_backward", mutates_args=())
def _shift_input_backward(
    grad: Tensor, grad_sum: Tensor, x: Tensor, D: Tensor, x_is_base: bool, need_x: bool, need_D: bool
) -> tuple[Tensor, Tensor]:
    with without_autocast(x.device.type):
        grad_x, grad_D = _backward(grad, grad_sum, x, D, x_is_base, need_x, need_D)
        return grad_x.contiguous(), grad_D


@_shift_input_backward.register_fake
def _(
    grad: Tensor, grad_sum: Tensor, x: Tensor, D: Tensor, x_is_base: bool, need_x: bool, need_D: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), D.new_empty(D.shape if need_D else 0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, D, base_x = inputs
    ctx.save_for_backward(x, D)
    ctx.x_is_base = base_x is None


def _autograd(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_D, _ = ctx.needs_input_grad
    # With create_graph the plain operations are called, which autograd can differentiate once more.
    run: Callable = _backward if torch.is_grad_enabled() else torch.ops.flashbone.shift_input_backward
    grad_x, grad_D = run(grad, grad_sum, *ctx.saved_tensors, ctx.x_is_base, need_x, need_D)
    return grad_x if need_x else None, grad_D if need_D else None, None if ctx.x_is_base else grad


_shift_input.register_autograd(_autograd, setup_context=_setup_context)
