"""The input shift of bat-row: `z_b = x_b D_b^T`, one batched GEMM over the input shards. No weight is read."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone import shards


def shift_input(
    base_x: Float[Tensor, "*batch in"],
    x: Float[Tensor, "*batch in"],
    D: Float[Tensor, "n_in r r"],
    scale: float,
) -> tuple[Float[Tensor, "*batch in"], Float[Tensor, "*batch r"]]:
    """`base_x + scale * z`, and `scale * sum_b z_b`, with `z_b = x_b D_b^T`.

    The whole output shift of the variant is `tile(sum_b z_b)`. Autograd keeps a view of x and D. The ragged tail is
    multiplied on its own, so that no padded copy of x exists; its z is as wide as a shard, and only its front shifts x.
    Runs in x's dtype; D's gradient arrives in D's own dtype.
    """
    r = D.shape[-1]
    blocks = (D if scale == 1 else D * scale).to(x.dtype).mT
    whole, tail = shards.full_and_tail(x, r)
    n_whole, tokens = whole.shape[-2], math.prod(x.shape[:-1])
    # (n_in, tokens, r): the batch of the GEMM is the shard, and the transposed view of x needs no copy.
    z = torch.bmm(whole.reshape(tokens, n_whole, r).transpose(0, 1), blocks[:n_whole])
    z_sum = z.sum(0)
    base_whole, base_tail = shards.full_and_tail(base_x, r)
    shifted = (base_whole + z.transpose(0, 1).reshape(whole.shape)).flatten(-2)
    if tail.shape[-1]:
        z_tail = tail.reshape(tokens, tail.shape[-1]) @ blocks[-1, : tail.shape[-1]]
        z_sum = z_sum + z_tail
        shifted = torch.cat([shifted, base_tail + z_tail[:, : tail.shape[-1]].reshape(tail.shape)], -1)
    return shifted, z_sum.reshape(*x.shape[:-1], r)
