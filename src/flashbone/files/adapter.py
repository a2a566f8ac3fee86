"""The neutral in-memory `Adapter` that formats are read into and written from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashbone.variants import Variant


@dataclass(frozen=True)
class Adapter:
    """An adapter, whatever the format of its file.

    Attributes:
        variant: the variant, with its settings.
        blocks: module name in the base model -> its `bone_block`.
        replacements: parameter name in the base model -> the trained value that takes its place (biases, and modules
            that were trained as a whole).
        config: the configuration as it was read.
        base_model: folder or hub id of the model that it was trained on, if the file names it.
        transposed: names of `blocks` whose weight is stored as (in, out): embeddings, experts of some models.
        parameters: names of `blocks` that are parameters themselves (`target_parameters`), not modules with a weight.
    """

    variant: Variant
    blocks: dict[str, Tensor]
    replacements: dict[str, Tensor]
    config: dict[str, Any]
    base_model: str | None = None
    transposed: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()

    def parameter(self, name: str) -> str:
        """The parameter in the base model that the block of this name shifts."""
        return name if name in self.parameters else f"{name}.weight"


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every value."""
    return a.dtype == b.dtype and torch.equal(a, b)


def is_same(a: Adapter, b: Adapter) -> bool:
    """Whether two adapters hold the very same tensors under the same names, for the same base, and mean the same."""

    def identity(x: Adapter) -> tuple:
        ids = ({name: id(tensor) for name, tensor in held.items()} for held in (x.blocks, x.replacements))
        return x.variant, x.base_model, x.transposed, x.parameters, *ids

    return identity(a) == identity(b)
