"""How far a weight that was taken out of a merge can be from the one that went in, by the numbers that are left.

Merged was `M = round(W + sum s delta(W))`. With u the unit roundoff of a dtype, n terms, and the block of the one that
depends on W giving `W (I + sD) + sD`, the sum that is inverted is off by at most (norms by matrix, Frobenius or max)

    e = u_M |M| + u32 [(n + 2) (|M| + |W| + sum s |delta|) + (r + 2) s |D| |W|]

which solving multiplies by at most `a = max 1 / sigma_min(I + sD)`; the result is rounded once more: `a e + u_W |W|`.
Of W only the computed one is known, so the bound b is on both sides, and is solved for. Numbers below a dtype's normal
range are rounded by up to u times that range.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashbone.variants.merged import Term, by_matrix, prepared

_U32 = torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True)
class Sizes:
    """Largest entry and Frobenius norm of a matrix, and how many entries it has."""

    largest: float
    norm: float
    count: int


def sizes(matrix: Tensor) -> Sizes:
    """Of any tensor, read in pieces."""
    largest = square = 0.0
    for piece in matrix.reshape(-1).split(1 << 18) if matrix.numel() else ():
        wide = piece.double()
        largest, square = max(largest, float(wide.abs().max())), square + float(wide.square().sum())
    return Sizes(largest, math.sqrt(square), matrix.numel())


@dataclass(frozen=True)
class Error:
    """Of a tensor or of many: largest entry, and sum of squares of the error and of the original."""

    largest: float = 0.0
    square: float = 0.0
    of_square: float = 0.0

    def __add__(self, other: "Error") -> "Error":
        squares = self.square + other.square, self.of_square + other.of_square
        return Error(max(self.largest, other.largest), *squares)

    @property
    def relative_rms(self) -> float:
        """RMS of the error over RMS of the original."""
        return math.sqrt(self.square / self.of_square) if self.of_square else float(self.square > 0)


def measured(got: Tensor, want: Tensor) -> Error:
    """The error of a tensor, exactly."""
    total = Error()
    for ours, theirs in zip(got.reshape(-1).split(1 << 18), want.reshape(-1).split(1 << 18), strict=True):
        if ours.numel():
            off = ours.double() - theirs.double()
            total += Error(float(off.abs().max()), float(off.square().sum()), float(theirs.double().square().sum()))
    return total


def bound(merged: Sizes, merged_dtype: torch.dtype, taken_out: Tensor, terms: Sequence[Term]) -> Error:
    """What the error of a tensor is at most.

    Args:
        merged: Of the merged tensor.
        merged_dtype: Its dtype.
        taken_out: What was computed back, as matrices (out, in).
        terms: What was merged.
    """
    ours = sizes(taken_out)
    amplification, relative, largest_delta, r = 1.0, 0.0, 0.0, 1
    for _, _, own in by_matrix(taken_out, taken_out, list(terms)):
        found = [_of_term(term, taken_out.shape[-1]) for term in prepared(taken_out, own)]
        amplification = max([amplification, *(a for a, _, _, _ in found)])
        relative = max([relative, *(norm for _, norm, _, _ in found)])
        largest_delta = max(largest_delta, sum(d for _, _, d, _ in found))
        r = max([r, *(size for _, _, _, size in found)])
    u_M, u_W = (torch.finfo(t).eps / 2 for t in (merged_dtype, taken_out.dtype))
    tiny_M, tiny_W = (torch.finfo(t).smallest_normal * u for t, u in ((merged_dtype, u_M), (taken_out.dtype, u_W)))
    n = len(terms)
    of_W = _U32 * ((n + 2) + (r + 2) * relative) if n else 0.0
    of_rest = _U32 * (n + 2) if n else 0.0

    def solved(M: float, W: float, delta: float, tiny: float, factor: float, spread: float) -> float:
        start = factor * (u_M * M + of_rest * (M + delta) + spread * of_W * W + tiny_M * tiny) + u_W * W + tiny_W * tiny
        share = factor * spread * of_W + u_W + factor * of_rest * relative
        return start / (1 - share) if share < 1 else math.inf

    root = math.sqrt(r) if n else 1.0
    entries = math.sqrt(ours.count)
    largest = solved(merged.largest, ours.largest, largest_delta, 1.0, amplification * root, root)
    norm = solved(merged.norm, ours.norm, largest_delta * entries, entries, amplification, 1.0)
    return Error(largest, norm**2, max(ours.norm - norm, 0.0) ** 2)


def _of_term(term: Term, in_features: int) -> tuple[float, float, float, int]:
    """How much solving multiplies errors by, the largest Frobenius norm of s D, the largest entry of the part of the
    delta that does not depend on W, and r."""
    variant, block, scale = term
    D = block.double() * scale
    largest = float(D.abs().max())
    if not variant.delta_depends_on_weight:
        return 1.0, 0.0, largest, 1
    r, tail = D.shape[-1], in_features % D.shape[-1]
    system = torch.eye(r, dtype=torch.float64) + D.reshape(-1, r, r)
    smallest = float(torch.linalg.svdvals(system).min())
    if tail and variant.name != "orthogonal":
        smallest = min(smallest, float(torch.linalg.svdvals(system[:, :tail, :tail]).min()))
    norm = float(torch.linalg.matrix_norm(D.reshape(-1, r, r)).max())
    own = 0.0 if variant.name == "orthogonal" else largest
    return (1 / smallest if smallest else math.inf), norm, own, r
