"""Split, join, pad, sum and tile shards: the only reshapes of the library.

A feature axis of `size` entries holds `ceil(size / r)` shards of r entries. A ragged last shard is padded with zeros,
and what sticks out is cropped on the way back. Views are returned where the sizes allow it.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from flashbone.errors import ShapeError


def count(size: int, r: int) -> int:
    """Number of shards of r entries that cover `size` entries: `ceil(size / r)`.

    Raises:
        ShapeError: `size` or `r` is not positive.
    """
    if size <= 0 or r <= 0:
        raise ShapeError(f"cannot cut {size} features into shards of {r}: both must be positive")
    return -(-size // r)


def split(x: Float[Tensor, "*batch size"], r: int) -> Float[Tensor, "*batch n r"]:
    """Cut the last axis into shards; a view of x where r divides the size, a zero-padded copy elsewhere."""
    n = count(x.shape[-1], r)
    missing = n * r - x.shape[-1]
    return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (n, r))


def join(shards: Float[Tensor, "*batch n r"], size: int) -> Float[Tensor, "*batch size"]:
    """Put shards side by side and crop to `size`; the inverse of `split`."""
    return shards.flatten(-2)[..., :size]


def full_and_tail(
    x: Float[Tensor, "*batch size"], r: int
) -> tuple[Float[Tensor, "*batch n_full r"], Float[Tensor, "*batch tail"]]:
    """The shards that are whole, and the ragged rest (`size % r` entries, maybe none): two views, nothing is padded."""
    whole = x.shape[-1] // r
    if not x.shape[-1] % r:  # apart: a decoding step feels slices
        return x.view(*x.shape[:-1], whole, r), x.narrow(-1, 0, 0)
    width = whole * r
    return x[..., :width].view(*x.shape[:-1], whole, r), x[..., width:]


def shard_sum(x: Float[Tensor, "*batch size"], r: int) -> Float[Tensor, "*batch r"]:
    """S(x): the sum of all shards, in x's dtype; torch accumulates bf16 in fp32 and rounds a few times at most. fp16
    comes as fp32, since a sum of a hundred shards may exceed its range.

    The ragged tail is added to the front of the sum, so that no padded copy of x is made. Autograd keeps nothing of x.
    """
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    whole, tail = full_and_tail(x, r)
    total = whole.sum(-2, dtype=dtype)
    return total + F.pad(tail, (0, r - tail.shape[-1])) if tail.shape[-1] else total


def tile(t: Float[Tensor, "*batch k"], size: int) -> Float[Tensor, "*batch size"]:
    """Repeat the last axis until `size` entries are filled: `tile(t)[..., j] = t[..., j % k]`."""
    n = count(size, t.shape[-1])
    if n == 1:
        return t[..., :size]
    return t.unsqueeze(-2).expand(*t.shape[:-1], n, t.shape[-1]).flatten(-2)[..., :size]


def add_tiled(y: Float[Tensor, "*batch size"], t: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch size"]:
    """`y + tile(t)`, without materialising the tiles where k divides the size."""
    if y.shape[-1] % t.shape[-1]:
        return y + tile(t, y.shape[-1])
    return (y.view(*y.shape[:-1], y.shape[-1] // t.shape[-1], t.shape[-1]) + t.unsqueeze(-2)).flatten(-2)


def split_weight(W: Float[Tensor, "out in"], r: int) -> Float[Tensor, "n_out r n_in r"]:
    """Blocks of a weight, `blocks[a, i, b, j] = W[a * r + i, b * r + j]`; a view of a contiguous W where r divides both
    sizes, a zero-padded copy elsewhere."""
    n_out, n_in = count(W.shape[0], r), count(W.shape[1], r)
    missing_out, missing_in = n_out * r - W.shape[0], n_in * r - W.shape[1]
    if missing_out or missing_in:
        W = F.pad(W, (0, missing_in, 0, missing_out))
    return rearrange(W.contiguous(), "(n_out i) (n_in j) -> n_out i n_in j", i=r, j=r)


def join_weight(
    blocks: Float[Tensor, "n_out r n_in r"], out_features: int, in_features: int
) -> Float[Tensor, "out in"]:
    """Put the blocks of a weight together and crop; the inverse of `split_weight`."""
    whole = rearrange(blocks, "n_out i n_in j -> (n_out i) (n_in j)")
    return whole[:out_features, :in_features]


def opmath_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which weights are merged: fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
