"""What bat-col and bat-row share: solving `W' = W + W D + D` for W, shard by shard."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from flashbone import shards


def solve_affine(merged: Float[Tensor, "out in"], D: Float[Tensor, "a b r r"]) -> Float[Tensor, "out in"]:
    """`W[a,b] = (merged[a,b] - D) (I + D)^-1`; of a ragged tail shard only the columns that exist take part.

    Args:
        merged: The merged weight.
        D: A block for each output shard (a, 1, r, r) or each input shard (1, b, r, r).
    """
    r, tail = D.shape[-1], merged.shape[1] % D.shape[-1]
    eye = torch.eye(r, dtype=D.dtype, device=D.device)
    blocks = rearrange(shards.split_weight(merged, r), "a i b j -> a b i j").contiguous()
    whole = slice(0, blocks.shape[1] - 1) if tail else slice(None)
    D_whole = D[:, whole]  # one for all of them in bat-col
    blocks[:, whole] = torch.linalg.solve(eye + D_whole, blocks[:, whole] - D_whole, left=False)
    if tail:
        D_tail, last = D[:, -1], blocks[:, -1]
        system = (eye + D_tail)[..., :tail, :tail]
        last[..., :tail] = torch.linalg.solve(system, last[..., :tail] - D_tail[..., :tail], left=False)
    return shards.join_weight(rearrange(blocks, "a b i j -> a i b j"), *merged.shape)
