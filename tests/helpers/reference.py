"""The slow, obvious oracle: each variant written from its formula with plain loops, in fp64.

Nothing here shares code with the fast path (not even `shards`), so that both cannot be wrong in the same way.
Source of the formulas: docs/maths.md; arXiv 2409.15371.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def _padded(W: Tensor, r: int) -> tuple[Tensor, int, int]:
    n_out, n_in = (W.shape[0] + r - 1) // r, (W.shape[1] + r - 1) // r
    padded = W.new_zeros(n_out * r, n_in * r)
    padded[: W.shape[0], : W.shape[1]] = W
    return padded, n_out, n_in


def block_size(variant: str, block: Tensor) -> int:
    """r, read off a block of the variant."""
    return block.shape[0] if variant in ("bone", "mini") else block.shape[-1]


def rotation(P: Float[Tensor, "r r"], eps: float = 1e-6) -> Float[Tensor, "r r"]:
    """The Cayley map as it is written in docs/maths.md, by an inverse, in fp64."""
    skew, eye = P.double() - P.double().T, torch.eye(len(P), dtype=torch.float64)
    return (1 + eps) * torch.linalg.inv((1 + eps) * eye - skew) @ (eye + skew)


def delta(
    variant: str, W: Float[Tensor, "out in"], block: Float[Tensor, "..."], Q: Float[Tensor, "r r"] | None = None
) -> Float[Tensor, "out in"]:
    """The difference that one adapter makes to W, block by block, in fp64; Q: that of `orthogonal`, if not Cayley's."""
    W, block = W.double(), block.double()
    r = block_size(variant, block)
    if variant == "orthogonal" and Q is None:
        Q = rotation(block)
    padded, n_out, n_in = _padded(W, r)
    result = padded.new_zeros(padded.shape)
    for a in range(n_out):
        for b in range(n_in):
            rows, columns = slice(a * r, a * r + r), slice(b * r, b * r + r)
            W_ab = padded[rows, columns]
            if variant == "bone":
                for i in range(r):
                    if a * r + i < W.shape[0]:
                        result[a * r + i, columns] = block[:, a * r + i]
            elif variant == "mini":
                for i in range(r):
                    result[a * r + i, columns] = block[:, (a * r + i) % block.shape[1]]
            elif variant == "bat-col":
                result[rows, columns] = W_ab @ block[a] + block[a]
            elif variant == "bat-row":
                result[rows, columns] = W_ab @ block[b] + block[b]
            elif variant == "orthogonal":
                assert Q is not None
                if b * r + r <= W.shape[1]:
                    result[rows, columns] = W_ab @ Q.double() - W_ab
            else:
                raise AssertionError(f"no reference for {variant}")
    return result[: W.shape[0], : W.shape[1]]


def forward(
    x: Float[Tensor, "*batch in"],
    W: Float[Tensor, "out in"],
    bias: Float[Tensor, "out"] | None,
    adapters: list[tuple[str, Tensor, float]],
) -> Float[Tensor, "*batch out"]:
    """`x (W + sum of scale * delta)^T + bias` in fp64, for adapters given as (variant, block, scale)."""
    total = W.double()
    for variant, block, scale in adapters:
        total = total + scale * delta(variant, W, block)
    y = x.double() @ total.T
    return y if bias is None else y + bias.double()
