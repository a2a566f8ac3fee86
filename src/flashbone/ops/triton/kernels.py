"""The Triton kernels, and nothing else; `launch.py` gives them sizes, strides and constants.

Rows are tokens. Offsets of rows are 64 bits wide, because tokens * in may exceed 2^31; those inside a row or a block
fit in 32. `no_type_check` keeps the shape checks of the tests off: `tl.constexpr` is no type, and a kernel is compiled
from its source.
"""

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
@no_type_check
def shard_sum_kernel(
    x_ptr,
    sum_ptr,
    in_features,
    r,
    n_in,
    x_row,
    DIVISOR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`sum[m] = sum_b x[m, b] / DIVISOR`: a program sums BLOCK_R columns of one row, BLOCK_N shards at a time."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    for first in range(0, n_in, BLOCK_N):
        feature = (first + tl.arange(0, BLOCK_N)[:, None]) * r + column
        total += tl.load(x_ptr + row * x_row + feature, (column < r) & (feature < in_features), 0.0).to(ACC)
    result = tl.sum(total, 0, keep_dims=True) / DIVISOR
    tl.store(sum_ptr + row * r + column, result.to(sum_ptr.dtype.element_ty), column < r)


@triton.jit
@no_type_check
def shift_kernel(
    x_ptr,
    base_ptr,
    blocks_ptr,
    broadcast_ptr,
    shifted_ptr,
    sum_ptr,
    tokens,
    in_features,
    r,
    n_in,
    x_row,
    base_row,
    block_b,
    block_k,
    block_j,
    HAS_BASE: tl.constexpr,
    HAS_BROADCAST: tl.constexpr,
    WITH_SUM: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """`z_b = (x_b + broadcast) M_b`, `shifted = base + z`, `sum = sum_b z_b`, with `M_b[k, j]` given by three strides.

    A program takes BLOCK_M tokens and BLOCK_J columns of every shard; z lives in registers only. Programs of the same
    tokens are neighbours, so that they find x in the cache. Sums of inputs are rounded to COMPUTE before the product;
    DOT is the dtype that the product is formed in.
    """
    tiles = tl.cdiv(r, BLOCK_J)
    row = ((tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    j = tl.program_id(0) % tiles * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
    z_sum = tl.zeros((BLOCK_M, BLOCK_J), ACC)
    for b in range(n_in):
        z = tl.zeros((BLOCK_M, BLOCK_J), ACC)
        for chunk in range(CHUNKS):
            k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = (row < tokens) & (k < r)[None, :]
            feature = b * r + k[None, :]
            x = tl.load(x_ptr + row * x_row + feature, inside & (feature < in_features), 0.0)
            if HAS_BROADCAST:
                x = x.to(ACC) + tl.load(broadcast_ptr + row * r + k[None, :], inside, 0.0).to(ACC)
            block = blocks_ptr + b * block_b + k[:, None] * block_k + j * block_j
            M = tl.load(block, (k < r)[:, None] & (j < r), 0.0)
            z = tl.dot(x.to(COMPUTE).to(DOT), M.to(DOT), z, input_precision=PRECISION, out_dtype=ACC)
        if WITH_SUM:
            z_sum += z
        feature = b * r + j
        inside = (row < tokens) & (j < r) & (feature < in_features)
        if HAS_BASE:
            z += tl.load(base_ptr + row * base_row + feature, inside, 0.0).to(ACC)
        tl.store(shifted_ptr + row * in_features + feature, z.to(shifted_ptr.dtype.element_ty), inside)
    if WITH_SUM:
        tl.store(sum_ptr + row * r + j, z_sum.to(sum_ptr.dtype.element_ty), (row < tokens) & (j < r))
