"""The registry of variants: for each its block, its moves and its delta. Formulas: docs/maths.md; arXiv 2409.15371."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from flashbone import shards
from flashbone.errors import ConfigError, NonFiniteError, ShapeError
from flashbone.ops.moves import Moves
from flashbone.variants import bat_col, bat_row, bone, mini


@dataclass(frozen=True)
class Variant:
    """One member of the family.

    Attributes:
        name: as written in configurations and files.
        block_shape: (out, in, r, mini_r) -> shape of `bone_block`.
        move: adds what the adapter does to one layer call, see `flashbone.ops.moves`.
        delta: (W (out, in), block) -> the difference that the adapter makes to W, in W's dtype or the block's.
        reads_weight: whether training needs the base's weight.
        delta_depends_on_weight: whether the delta is a function of W, not only of the block.
    """

    name: str
    block_shape: Callable[[int, int, int, int], tuple[int, ...]]
    move: Callable[[Moves, Tensor, Tensor, float], None]
    delta: Callable[[Tensor, Tensor], Tensor]
    reads_weight: bool
    delta_depends_on_weight: bool


def _variant(
    name: str, module: ModuleType, reads_weight: bool = False, delta_depends_on_weight: bool = False
) -> Variant:
    return Variant(name, module.block_shape, module.move, module.delta, reads_weight, delta_depends_on_weight)


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        _variant("bone", bone),
        _variant("mini", mini),
        _variant("bat-col", bat_col, reads_weight=True, delta_depends_on_weight=True),
        _variant("bat-row", bat_row, delta_depends_on_weight=True),
    )
}


def get(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in VARIANTS:
        raise ConfigError(f"variant: got {name!r}, wanted one of {', '.join(map(repr, VARIANTS))}")
    return VARIANTS[name]


def random_block_(block: Tensor) -> Tensor:
    """Fill a block in place with the random start that PEFT gives to `init_weights=False` (for tests)."""
    return torch.nn.init.kaiming_uniform_(block, a=math.sqrt(5))


def check_block(where: str, variant: Variant, block: Tensor, out_features: int, in_features: int) -> None:
    """Check that a block read from a file fits a layer; r and mini_r are the block's own.

    Raises:
        ShapeError: it does not.
    """
    dimensions = len(variant.block_shape(1, 1, 1, 1))
    if block.ndim == dimensions and all(block.shape):
        r, mini_r = (block.shape[-1], 1) if dimensions == 3 else (block.shape[0], block.shape[1])
        if tuple(block.shape) == variant.block_shape(out_features, in_features, r, mini_r):
            return
    raise ShapeError(
        f"{where}: a {variant.name} block of shape {tuple(block.shape)} does not fit a layer with {out_features} output"
        f" and {in_features} input features; is it an adapter of another model or variant?"
    )


def merged_weight(
    W: Tensor,
    adapters: Iterable[tuple[Variant, Tensor, float]],
    where: str = "",
    must_be_finite: bool = False,
) -> Tensor:
    """`W + sum of scale * delta(W)`: every delta refers to the pristine W (out, in), so the order never matters.

    Computed in fp32 (fp64 if anything is fp64) and rounded once to W's dtype; a new tensor.

    Raises:
        NonFiniteError: `must_be_finite`, and the result holds NaN or infinity.
    """
    adapters = list(adapters)
    dtype = shards.opmath_dtype(W, *(block for _, block, _ in adapters))
    wide = W.to(dtype)
    total = wide.clone()
    for variant, block, scale in adapters:
        total.add_(variant.delta(wide, block.to(W.device, dtype)), alpha=scale)
    result = total.to(W.dtype)
    if must_be_finite and not torch.isfinite(result).all():
        bad = int((~torch.isfinite(result)).sum())
        raise NonFiniteError(
            f"{where}: the merged weight would hold {bad} values that are NaN or infinite; the adapter or the base is"
            " broken, nothing was changed"
        )
    return result
