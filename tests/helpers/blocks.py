"""Sizes, layers and random non-zero blocks that the tests of the maths share."""

import torch
from torch import Tensor

from flashbone import variants
from flashbone.ops.moves import Moves

VARIANT_NAMES = tuple(variants.VARIANTS)

# (out, in, r): divisible, ragged on one side, on both, block larger than the layer, one shard, r = 1
SIZES = [(8, 12, 4), (8, 12, 3), (10, 12, 4), (8, 14, 4), (11, 13, 4), (5, 3, 8), (4, 4, 4), (6, 7, 1)]

# The same with each variant that exists there: a rotation is at most as large as the input.
CASES = [(name, size) for name in VARIANT_NAMES for size in SIZES if name != "orthogonal" or size[2] <= size[1]]


def random_block(name: str, out: int, in_: int, r: int, *, dtype=torch.float64, mini_r: int = 3, std=0.3) -> Tensor:
    """A random block of the variant: a zero start would hide bugs."""
    return torch.randn(variants.get(name).block_shape(out, in_, r, mini_r), dtype=dtype) * std


def adapted(x: Tensor, W: Tensor, bias: Tensor | None, adapters: list[tuple[str, Tensor, float]]) -> Tensor:
    """A linear layer with adapters, as the tuner layer runs it, without the tuner."""
    moves = Moves(x)
    for name, block, scale in adapters:
        variants.get(name).move(moves, x, block, scale)
    return moves.run(lambda base_x: torch.nn.functional.linear(base_x, W, bias), lambda: (W, bias))
