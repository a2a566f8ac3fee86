"""The neutral in-memory `Adapter` that formats are read into and written from, and what a format is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashbone.variants import Variant

if TYPE_CHECKING:
    from flashbone.files.cards import AdapterCard
    from flashbone.files.lora import Lora


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


@dataclass(frozen=True)
class AdapterFormat:
    """A format of adapter files; each has a file of its own, and a line in `reading.FORMATS`.

    Attributes:
        name: as users write it.
        holds: `Adapter` or `Lora`: what it is read into and written from.
        read: from a path; None: it is only written.
        write: to an empty folder, or to a new file where the format is one file.
        usage: of a card, in Markdown: how such an adapter is loaded, converted and merged.
        peft_type: PEFT's name of the method; empty: PEFT does not read the format.
        suffix: of the file; empty: the format is a folder.
    """

    name: str
    holds: type[Adapter] | type[Lora]
    read: Callable[[Path], Adapter | Lora] | None
    write: Callable[[Any, Path], None]
    usage: Callable[[AdapterCard], str]
    peft_type: str = ""
    suffix: str = ""
