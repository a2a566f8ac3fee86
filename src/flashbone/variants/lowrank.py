"""An adapter's delta as a product of two factors, as a LoRA has them: exact where the variant is one, else the best.

The best B A of a rank leaves out the smallest singular values (Eckart and Young 1936). They come from the eigenvectors
of the smaller Gram matrix, in fp64: as fast as an SVD in fp32 for a square matrix, faster for others, and with errors
far below one part in a million. Errors are measured on the factors as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone import shards
from flashbone.errors import ConfigError, NonFiniteError
from flashbone.variants.base import Variant

MIN_ERROR = 1e-6  # what factors in fp32 can be told to keep
_CHUNK = 1 << 24  # entries that are widened to fp64 at once


@dataclass(frozen=True)
class Factors:
    """`delta = B A`.

    Attributes:
        A: (rank, in).
        B: (out, rank).
        error: `|delta - B A| / |delta|` in Frobenius norm, of the factors as they are; 0 where they are exact.
        used: rank before padding.
        is_exact: whether they are the delta of every W, not the best for this one.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    error: float
    used: int
    is_exact: bool = False


def pad(A: Float[Tensor, "k in"], B: Float[Tensor, "out k"], rank: int) -> tuple[Tensor, Tensor]:
    """The factors with rows and columns of zeros up to a rank that is not below theirs; contiguous copies."""
    wide_A, wide_B = A.new_zeros(rank, A.shape[1]), B.new_zeros(B.shape[0], rank)
    wide_A[: A.shape[0]], wide_B[:, : B.shape[1]] = A, B
    return wide_A, wide_B


def check_size(rank: int | None, error: float | None) -> None:
    """Check what was asked of a LoRA's size.

    Raises:
        ConfigError: both were given, or one that cannot be.
    """
    problems = []
    if rank is not None and error is not None:
        problems.append("got a rank and an error, which choose one another; give one of the two")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        problems.append(f"rank: got {rank!r}, wanted a positive integer")
    if error is not None and not (isinstance(error, float) and MIN_ERROR <= error < 1):
        problems.append(f"error: got {error!r}, wanted a number from {MIN_ERROR:g} to below 1, such as 0.01")
    if problems:
        raise ConfigError("; ".join(problems))


def factored(
    variant: Variant,
    block: Tensor,
    sizes: tuple[int, int],
    weight: Callable[[], Float[Tensor, "out in"]],
    rank: int | None,
    error: float | None,
    scale: float = 1.0,
) -> Factors:
    """Factors of `scale * delta(W)`; exact ones of the variant unless something smaller was asked for.

    Args:
        variant: The variant.
        block: Its block.
        sizes: (out, in) of W.
        weight: Gives W where the variant needs it; not called where not.
        rank: At most this rank. None, and no error: only exact factors will do.
        error: The smallest rank that comes as near as this, see `Factors.error`.
        scale: A factor of the delta.

    Raises:
        ConfigError: the variant has no exact factors, and neither rank nor error was given.
        NonFiniteError: the delta holds NaN or infinity.
    """
    if not torch.isfinite(block).all():
        raise NonFiniteError("the block holds NaN or infinity; the adapter is broken")
    exact = variant.factors(block, *sizes)
    if exact is not None:
        A, B = exact
        B = B if scale == 1 else _scaled(B, scale)
        if error is None and (rank is None or rank >= len(A)):
            return Factors(A, B, 0.0, len(A), is_exact=True)
        wide = shards.opmath_dtype(A)
        return best(B.to(wide) @ A.to(wide), rank, error, torch.linalg.qr(B.double()).Q)
    if rank is None and error is None:
        raise ConfigError(
            f"the delta of {variant.name} depends on the weight and has no exact factors; give the rank of the LoRA"
            f" (the adapter's r here is {block.shape[-1]}), or the error that it may have, such as 0.01"
        )
    W = weight()
    dtype = shards.opmath_dtype(W, block)
    return best(variant.delta(W.to(dtype), block.to(W.device, dtype)) * scale, rank, error)


def _scaled(B: Tensor, scale: float) -> Tensor:
    """`B * scale`: in B's dtype where nothing is rounded, else in fp32 at least."""
    wide = B.double() * scale
    narrow = wide.to(B.dtype)
    return narrow if torch.equal(narrow.double(), wide) else wide.to(shards.opmath_dtype(B))


def best(
    D: Float[Tensor, "out in"], rank: int | None, error: float | None, span: Float[Tensor, "out k"] | None = None
) -> Factors:
    """The closest B A of a rank, or that of the smallest rank which comes near enough; in fp32 (fp64 for an fp64 D).

    Args:
        D: The matrix.
        rank: At most this rank.
        error: Or the largest relative error, measured on what is returned.
        span: Orthonormal columns in whose span those of D lie, where that is known to be small.

    Raises:
        NonFiniteError: D holds NaN or infinity.
        ConfigError: no rank comes that near in this dtype.
    """
    if not torch.isfinite(D).all():
        raise NonFiniteError("the delta holds NaN or infinity; the adapter or the base is broken")
    if span is None and D.shape[0] > D.shape[1]:
        turned = best(D.mT, rank, error)
        return Factors(turned.B.mT, turned.A.mT, turned.error, turned.used)
    values, vectors = _spectrum(D, span)
    left_out = (values.flip(0).cumsum(0).flip(0) / values.sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    highest = int(torch.count_nonzero(values))
    k = min(rank or highest, highest) if error is None else int(torch.count_nonzero(left_out > error))
    while True:
        nearest = _nearest(D, values[:k], vectors[:, :k])
        if error is None or nearest.error <= error:
            return nearest
        if k == highest:
            raise ConfigError(f"error: got {error:g}, but {D.dtype} factors of full rank miss by {nearest.error:.1e}")
        k += 1


def _spectrum(D: Tensor, span: Tensor | None) -> tuple[Float[Tensor, "k"], Float[Tensor, "out k"]]:
    """Squared singular values, the largest first, and left singular vectors, in fp64."""
    rows = D.shape[0] if span is None else span.shape[1]
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=D.device)
    for part in _wide_columns(D):
        part = part if span is None else span.mT @ part
        gram.addmm_(part, part.mT)
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(gram))
    rounding = values[0] * rows * torch.finfo(torch.float64).eps  # of the Gram matrix and its eigenvalues
    values = torch.where(values > rounding, values, 0.0)
    return values, vectors if span is None else span @ vectors


def _nearest(D: Tensor, values: Float[Tensor, "k"], vectors: Float[Tensor, "out k"]) -> Factors:
    """`B A` with `B = U sqrt(s)` and `A = U^T D / sqrt(s)`: both factors of one magnitude, for fp16's sake."""
    roots = values.pow(0.25)
    B = (vectors * roots).to(D.dtype)
    project = (vectors / roots).mT
    A = torch.cat([(project @ part).to(D.dtype) for part in _wide_columns(D)], 1)
    missed = sum(
        float((part - B.double() @ a.double()).square().sum())
        for part, a in zip(_wide_columns(D), A.split(_columns(D), 1), strict=True)
    )
    total = sum(float(part.square().sum()) for part in _wide_columns(D))
    return Factors(A, B, math.sqrt(missed / total) if total else 0.0, len(values))


def _columns(D: Tensor) -> int:
    return max(1, _CHUNK // D.shape[0])


def _wide_columns(D: Tensor) -> Iterator[Tensor]:
    return (part.double() for part in D.split(_columns(D), 1))
