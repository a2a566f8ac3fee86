"""Plain LoRAs: two factors for each layer, which every engine that serves adapters takes.

adapter_config.json          peft_type "LORA", r, lora_alpha = r, target_modules, fan_in_fan_out, ...
adapter_model.safetensors:
    base_model.model.<module>.lora_A.weight         (rank, in)
    base_model.model.<module>.lora_B.weight         (out, rank)
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Lora:
    """What a plain LoRA says, whatever its format: `delta = B A`, so its alpha is its rank.

    Attributes:
        factors: module name in the base model -> A (rank, in) and B (out, rank); all have one rank.
        replacements: as in `Adapter`.
        base_model: folder or hub id of the model that it belongs to, if known.
        base_config: that model's config.json, empty if not known.
        conv1d: names of `factors` whose weight is stored as (in, out) in a layer (PEFT's `fan_in_fan_out`).
        embeddings: names of `factors` that are embedding tables.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    replacements: dict[str, Tensor] = field(default_factory=dict)
    base_model: str | None = None
    base_config: dict[str, Any] = field(default_factory=dict)
    conv1d: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()

    @property
    def rank(self) -> int:
        """Rows of every A."""
        return max(A.shape[0] for A, _ in self.factors.values())


def read(path: str | Path) -> Lora:
    raise NotImplementedError


def write(lora: Lora, folder: Path) -> None:
    raise NotImplementedError
