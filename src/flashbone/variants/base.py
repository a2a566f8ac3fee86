"""What every member of the family answers: the shape of its block, its move, its delta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flashbone.ops.moves import Moves


@dataclass(frozen=True)
class Variant(ABC):
    """One member of the family, with its settings as fields; equal if variant and settings are.

    Attributes:
        name: as written in configurations and files.
        reads_weight: whether training needs the base's weight.
        delta_depends_on_weight: whether the delta is a function of W, not only of the block.
        is_linear: whether the delta is linear in the block.
    """

    name: ClassVar[str]
    reads_weight: ClassVar[bool] = False
    delta_depends_on_weight: ClassVar[bool] = False

    @property
    def is_linear(self) -> bool:
        return True

    @abstractmethod
    def block_shape(self, out_features: int, in_features: int, r: int, mini_r: int) -> tuple[int, ...]:
        """Shape of `bone_block`.

        Raises:
            ShapeError: the variant does not exist for these sizes.
        """

    def period(self, block: Tensor) -> int:
        """Rows of W after which what happens to one repeats, or goes on with the next part of the block."""
        return 1

    def rows(self, block: Tensor, start: int, stop: int) -> Tensor:
        """The part of the block whose delta is that of rows [start, stop) of W; a view. `start` is a multiple of the
        period."""
        return block

    def solved(self, block: Tensor) -> tuple[Variant, Tensor]:
        """A variant and block with the same delta, for which nothing has to be solved."""
        return self, block

    @abstractmethod
    def move(self, moves: Moves, x: Tensor, block: Tensor, scale: float) -> None:
        """Add what the adapter does to one layer call, see `flashbone.ops.moves`."""

    @abstractmethod
    def delta(self, W: Tensor, block: Tensor) -> Tensor:
        """The difference that the adapter makes to W (out, in), in W's dtype or the block's."""

    def factors(self, block: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor] | None:
        """A (rank, in) and B (out, rank) with `delta(W) = B A` for every W, in the block's dtype; None: the variant has
        no such. B may be a view of the block."""
        return None
