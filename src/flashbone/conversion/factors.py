"""Between block adapters and plain LoRAs: exact factors where there are any, else a truncated SVD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashbone.checkpoint import Adapter
from flashbone.checkpoint.base import BaseModel
from flashbone.checkpoint.lora import Lora


@dataclass(frozen=True)
class ModuleError:
    """What the LoRA of one module leaves out.

    Attributes:
        name: of the module.
        rank: that its factors use, before they are padded to the rank of the whole LoRA.
        error: `|delta - B A| / |delta|`, in Frobenius norm, of the factors as they are stored.
    """

    name: str
    rank: int
    error: float


def to_lora(
    adapter: Adapter,
    model: BaseModel,
    rank: int | None,
    error: float | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Lora, tuple[ModuleError, ...]]:
    """The adapter as a LoRA of one rank, and what each module lost by it (nothing where it is exact)."""
    raise NotImplementedError


def resized(lora: Lora, rank: int | None, error: float | None, where: Path) -> Lora:
    """The same LoRA with its factors padded with zeros to a rank."""
    raise NotImplementedError


def to_adapter(lora: Lora, where: Path) -> Adapter:
    """The `bone` adapter that a LoRA is, where every A is stacked identities."""
    raise NotImplementedError
