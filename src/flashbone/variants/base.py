"""What a variant defines, each in its own file; no other code asks for a variant's name.

A new variant is one file with a subclass of `Variant`, and one entry in the registry (`variants/__init__.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from flashbone.ops.moves import Moves


@dataclass(frozen=True)
class Variant(ABC):
    """One member of the family, with its settings as fields; equal if variant and settings are.

    Attributes:
        name: as written in configurations and files.
        reads_weight: whether training needs the base's weight.
        delta_depends_on_weight: whether the delta is a function of W, not only of the block.
        is_low_rank: whether the delta has `factors`, and so is a LoRA.
        is_linear: whether the delta is linear in the block.
        config_fields: fields of BoneConfig (and of adapter_config.json) -> the settings here that they hold.
        size_field: another field of BoneConfig for the block size, which also chooses this variant.
        peft_init_weights: the `init_weights` by which PEFT 0.14 to 0.18 call it, with a zero start; None: they lack it.
        miss_init_weights: the same for PEFT's MISS.
        rwkv_peft_mode: RWKV-PEFT's mode; None: it lacks it.
        peft_size_condition: what plain PEFT asks of the layers' sizes, in words.
    """

    name: ClassVar[str]
    reads_weight: ClassVar[bool] = False
    delta_depends_on_weight: ClassVar[bool] = False
    is_low_rank: ClassVar[bool] = False
    config_fields: ClassVar[Mapping[str, str]] = {}
    size_field: ClassVar[str | None] = None
    peft_init_weights: ClassVar[bool | Literal["bat"] | None] = None
    miss_init_weights: ClassVar[bool | str | None] = None
    rwkv_peft_mode: ClassVar[str | None] = None
    peft_size_condition: ClassVar[str] = ""

    @property
    def is_linear(self) -> bool:
        return True

    @property
    def settings(self) -> dict[str, object]:
        """The fields of BoneConfig that hold this variant's settings, with their values."""
        return {field: getattr(self, setting) for field, setting in self.config_fields.items()}

    @abstractmethod
    def block_shape(self, out_features: int, in_features: int, r: int, mini_r: int) -> tuple[int, ...]:
        """Shape of `bone_block`.

        Raises:
            ShapeError: the variant does not exist for these sizes.
        """

    def block_fields(self, block: Tensor) -> dict[str, int]:
        """The fields of BoneConfig that decide the size of this block, with their values."""
        return {"r": block.shape[-2]}

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

    def undo(self, merged: Tensor, block: Tensor, scale: float) -> Tensor:
        """The W for which `merged = W + scale * delta(W)`, up to rounding; `merged` may be overwritten.

        Raises:
            RuntimeError: torch's LinAlgError: the factor of W is singular.
        """
        assert not self.delta_depends_on_weight, f"{self.name} must define how W is solved for"
        return merged.sub_(self.delta(merged, block), alpha=scale)

    def to_bone(self, block: Tensor, out_features: int) -> Tensor | None:
        """The block of `bone` with the same delta; None: not every block has one."""
        return None

    def factors(self, block: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor] | None:
        """A (rank, in) and B (out, rank) with `delta(W) = B A` for every W, in the block's dtype; None: the variant has
        no such. B may be a view of the block."""
        return None


@runtime_checkable
class RotatingVariant(Protocol):
    """A variant whose block is a rotation, or near one."""

    def orthogonality_error(self, block: Tensor) -> float: ...
    def angle_deg(self, block: Tensor) -> float: ...
