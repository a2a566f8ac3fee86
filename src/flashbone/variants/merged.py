"""Adapters into a weight and out again, some rows at a time: beside W and the result a few chunks are in memory.

Whoever merges goes through here, and so through the same chunks: how a GEMM rounds depends on its sizes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone import shards
from flashbone.errors import FlashboneError, NonFiniteError
from flashbone.variants.base import Variant

Term = tuple[Variant, Tensor, float]  # variant, block, scale

# Entries of a chunk, which in fp32 fits into a cache: 4096 x 4096 took 40 to 70% of the time of the whole at once, 2^22
# entries 60 to 85% (one thread); smaller ones were no faster.
CHUNK = 1 << 19

# Relative error up to which a weight counts as computed back: far above fp32 rounding, far below any damage.
UNDO_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
UNDO_TOLERANCE_FP32 = 1e-4


def merged_weight(
    W: Float[Tensor, "*experts out in"],
    adapters: Iterable[Term],
    where: str = "",
    must_be_finite: bool = False,
    result: Float[Tensor, "*experts out in"] | None = None,
) -> Float[Tensor, "*experts out in"]:
    """`W + sum of scale * delta(W)`: every delta refers to the pristine W, and the order never matters.

    Computed in fp32 (fp64 if anything is fp64) and rounded once, to the dtype of the result.

    Args:
        W: The pristine weight; of stacked experts with a block for each in `adapters`.
        adapters: Variant, block and scale of each.
        where: What an error calls the weight.
        must_be_finite: Raise if the result holds NaN or infinity.
        result: Where to write it, in any floating dtype: W itself, too. None: a new tensor like W.

    Raises:
        NonFiniteError: see `must_be_finite`; `result` has been written to.
    """
    result = torch.empty_like(W) if result is None else result
    bad = sum(_merge(*part, must_be_finite) for part in by_matrix(W, result, list(adapters)))
    if bad:
        raise NonFiniteError(
            f"{where}: the merged weight would hold {bad} values that are NaN or infinite; the adapter or the base is"
            " broken, nothing was changed"
        )
    return result


def by_matrix(
    W: Tensor, result: Tensor, adapters: Sequence[Term]
) -> Iterator[tuple[Float[Tensor, "out in"], Float[Tensor, "out in"], list[Term]]]:
    """Each matrix of a weight, views of W and of the result, with its own part of the adapters in their order."""
    if W.ndim == 2:
        yield W, result, in_order(adapters)
        return
    for e in range(len(W)):
        yield W[e], result[e], in_order((variant.inner, block[e], s) for variant, block, s in adapters)  # pyright: ignore


def in_order(adapters: Iterable[Term]) -> list[Term]:
    """The adapters in an order that follows from what they are: sums are then the same to the last bit, whoever lists
    them."""
    adapters = list(adapters)
    return sorted(adapters, key=_rank) if len(adapters) > 1 else adapters


def _rank(term: Term) -> tuple:
    variant, block, scale = term
    wide = block.detach().to("cpu", shards.opmath_dtype(block)).contiguous()
    return repr(variant), tuple(block.shape), scale, wide.view(-1).view(torch.uint8).numpy().tobytes()


def prepared(W: Tensor, adapters: Sequence[Term]) -> list[Term]:
    """The adapters as they are merged: on W's device, in the dtype of the sum, nothing left to be solved."""
    dtype = shards.opmath_dtype(W, *(block for _, block, _ in adapters))
    return [(*variant.solved(block.to(W.device, dtype)), scale) for variant, block, scale in adapters]


def row_chunks(W: Float[Tensor, "out in"], adapters: Sequence[Term]) -> Iterator[tuple[Tensor, slice, list[Term]]]:
    """Rows of W, which rows they are, and the adapters cut to them; all starts are multiples of all periods."""
    period = math.lcm(1, *(variant.period(block) for variant, block, _ in adapters))
    rows = max(CHUNK // W.shape[1] // period, 1) * period
    for start in range(0, W.shape[0], rows):
        stop = min(start + rows, W.shape[0])
        terms = [(variant, variant.rows(block, start, stop), scale) for variant, block, scale in adapters]
        yield W[start:stop], slice(start, stop), terms


def _merge(W: Tensor, result: Tensor, adapters: Sequence[Term], count_bad: bool) -> int:
    """Write the merged W to `result`; how many of its values are NaN or infinite."""
    adapters = prepared(W, adapters)
    dtype = shards.opmath_dtype(W, *(block for _, block, _ in adapters))
    bad = 0
    for rows, where, terms in row_chunks(W, adapters):
        # Copies of our own: how a GEMM rounds depends on its operands' alignment, and a file's tensor may lie anywhere.
        wide = torch.empty(rows.shape, dtype=dtype, device=W.device).copy_(rows)
        total = wide.clone() if len(terms) > 1 else wide
        for variant, block, scale in terms:
            total.add_(variant.delta(wide, block.clone(memory_format=torch.contiguous_format)), alpha=scale)
        result[where] = total
        if count_bad:
            bad += int((~torch.isfinite(result[where])).sum())
    return bad


def check_undoable(
    pristine: Float[Tensor, "*experts out in"],
    merged: Float[Tensor, "*experts out in"],
    adapters: Iterable[Term],
) -> None:
    """Check that `undo(merged, adapters)` gives the pristine weight back, by doing it.

    Raises:
        FlashboneError: two adapters depend on the weight, or the factor of one is singular or nearly so.
    """
    adapters = list(adapters)
    problem = "two of these adapters depend on the base weight (bat-*, orthogonal)"
    if sum(variant.delta_depends_on_weight for variant, _, _ in adapters) < 2:
        problem = "the block by which the weight was multiplied is nearly singular"
        try:
            error = (undo(merged, adapters).double() - pristine.double()).norm() / pristine.double().norm()
        except RuntimeError:  # torch's LinAlgError: singular
            error = torch.tensor(torch.nan)
        if error <= UNDO_TOLERANCE.get(pristine.dtype, UNDO_TOLERANCE_FP32) or not pristine.count_nonzero():
            return
    raise FlashboneError(
        f"without the original weight this merge could not be undone: {problem}; leave keep_original on"
    )


def undo(
    merged: Float[Tensor, "*experts out in"],
    adapters: Iterable[Term],
    result: Float[Tensor, "*experts out in"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*experts out in"]:
    """The W from which `variants.merged_weight(W, adapters)` came.

    Additive adapters are subtracted; at most one that depends on W (bat-*, orthogonal) is then solved for.

    Args:
        merged: The merged weight.
        adapters: As they were merged.
        result: Where to write W, in any floating dtype: `merged` itself, too. None: a new tensor like it.
        dtype: Inside. None: the one in which it was merged, fp32 or fp64.
    """
    result = torch.empty_like(merged) if result is None else result
    for W, target, terms in by_matrix(merged, result, list(adapters)):
        terms = prepared(W, terms)
        wide = dtype or shards.opmath_dtype(W, *(block for _, block, _ in terms))
        for rows, where, row_terms in row_chunks(W, terms):
            row_terms = [(variant, block.to(wide), scale) for variant, block, scale in row_terms]
            target[where] = _undone(rows.to(wide, copy=True), row_terms)
    return result


def _undone(W: Float[Tensor, "rows in"], adapters: list[Term]) -> Float[Tensor, "rows in"]:
    assert sum(variant.delta_depends_on_weight for variant, _, _ in adapters) < 2, "two adapters depend on the weight"
    for variant, block, scale in sorted(adapters, key=lambda term: term[0].delta_depends_on_weight):
        W = variant.undo(W, block, scale)
    return W
