"""Adapter and model files on disk: one file a format, all of them over one neutral in-memory `Adapter`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashbone.variants import Variant


@dataclass(frozen=True)
class Adapter:
    """What an adapter file says, whatever its format.

    Attributes:
        variant: the variant, with its settings.
        blocks: module name in the base model -> its `bone_block`.
        replacements: parameter name in the base model -> the trained value that takes its place (biases, and modules
            that were trained as a whole).
        config: the configuration as it was read.
        base_model: folder or hub id of the model that it was trained on, if the file says.
    """

    variant: Variant
    blocks: dict[str, Tensor]
    replacements: dict[str, Tensor]
    config: dict[str, Any]
    base_model: str | None = None


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every value."""
    return a.dtype == b.dtype and torch.equal(a, b)
