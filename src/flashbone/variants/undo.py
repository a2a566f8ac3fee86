"""Take adapters out of a merged weight by computation, for merges that kept no original. Exact up to rounding only."""

from collections.abc import Iterable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from flashbone import shards
from flashbone.errors import FlashboneError
from flashbone.variants import Variant
from flashbone.variants.merged import Term, by_matrix, prepared, row_chunks
from flashbone.variants.orthogonal import Orthogonal

# Relative error up to which a weight counts as computed back: far above fp32 rounding, far below any damage.
UNDO_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
UNDO_TOLERANCE_FP32 = 1e-4


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
        f"without the original weight this merge could not be taken back: {problem}; leave keep_original on"
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
        for rows, where, own in row_chunks(W, terms):
            own = [(variant, block.to(wide), scale) for variant, block, scale in own]
            target[where] = _undone(rows.to(wide, copy=True), own)
    return result


def _undone(W: Float[Tensor, "rows in"], adapters: list[Term]) -> Float[Tensor, "rows in"]:
    solve_for = None
    for variant, block, scale in adapters:
        if variant.delta_depends_on_weight:
            assert solve_for is None, "two adapters depend on the weight"
            solve_for = variant, block, scale
        else:
            W.sub_(variant.delta(W, block), alpha=scale)
    return W if solve_for is None else _solve(W, *solve_for)


def _solve(merged: Float[Tensor, "out in"], variant: Variant, block: Tensor, scale: float) -> Float[Tensor, "out in"]:
    if isinstance(variant, Orthogonal):
        return _solve_rotation(merged, variant.offset(block) * scale)
    D = block * scale
    return _solve_bat(merged, D.unsqueeze(1) if variant.name == "bat-col" else D.unsqueeze(0))


def _solve_rotation(merged: Float[Tensor, "out in"], E: Float[Tensor, "r r"]) -> Float[Tensor, "out in"]:
    """`W[a,b] = W'[a,b] (I + E)^-1` for whole shards."""
    whole, tail = shards.full_and_tail(merged, E.shape[-1])
    eye = torch.eye(E.shape[-1], dtype=E.dtype, device=E.device)
    return torch.cat([torch.linalg.solve(eye + E, whole, left=False).flatten(-2), tail], -1)


def _solve_bat(merged: Float[Tensor, "out in"], D: Float[Tensor, "a b r r"]) -> Float[Tensor, "out in"]:
    """`W[a,b] = (W'[a,b] - D) (I + D)^-1`; of a ragged tail shard only the columns that exist take part."""
    r, tail = D.shape[-1], merged.shape[1] % D.shape[-1]
    eye = torch.eye(r, dtype=D.dtype, device=D.device)
    blocks = rearrange(shards.split_weight(merged, r), "a i b j -> a b i j").contiguous()
    whole = slice(0, blocks.shape[1] - 1) if tail else slice(None)
    D_whole = D[:, whole]  # of bat-col the one for all of them
    blocks[:, whole] = torch.linalg.solve(eye + D_whole, blocks[:, whole] - D_whole, left=False)
    if tail:
        D_tail, last = D[:, -1], blocks[:, -1]
        system = (eye + D_tail)[..., :tail, :tail]
        last[..., :tail] = torch.linalg.solve(system, last[..., :tail] - D_tail[..., :tail], left=False)
    return shards.join_weight(rearrange(blocks, "a b i j -> a i b j"), *merged.shape)
