"""One block for each expert: any variant on a stack of matrices, (experts, out, in), such as fused mixtures keep."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone.ops.moves import Moves
from flashbone.variants.base import Variant


@dataclass(frozen=True)
class PerExpert(Variant):
    """The inner variant for every expert by itself; its block has a leading axis of experts.

    Attributes:
        inner: The variant.
        experts: How many.
    """

    inner: Variant
    experts: int

    def __post_init__(self) -> None:
        for attribute in ("name", "reads_weight", "delta_depends_on_weight"):
            object.__setattr__(self, attribute, getattr(self.inner, attribute))

    @property
    def is_linear(self) -> bool:
        return self.inner.is_linear

    def block_shape(self, out_features: int, in_features: int, r: int, mini_r: int) -> tuple[int, ...]:
        """(experts, ...)."""
        return self.experts, *self.inner.block_shape(out_features, in_features, r, mini_r)

    def block_fields(self, block: Float[Tensor, "experts ..."]) -> dict[str, int]:
        """Those of the inner variant."""
        return self.inner.block_fields(block)

    def to_bone(self, block: Float[Tensor, "experts ..."], out_features: int) -> Float[Tensor, "experts r out"] | None:
        """A block of `bone` for each expert."""
        return self.inner.to_bone(block, out_features)

    def move(self, moves: Moves, x: Tensor, block: Tensor, scale: float) -> None:
        raise NotImplementedError("rows of x belong to one expert each; the stack of weights is shifted instead")

    def delta(self, W: Float[Tensor, "experts out in"], block: Float[Tensor, "experts ..."]) -> Tensor:
        """`delta(W[e], block[e])` for every expert e, in one batch."""
        return torch.vmap(partial(type(self.inner).delta, self.inner))(W, block)
