"""What a format of adapter files is, and the contents of a model card, which a format puts into words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterFormat(Generic[T]):
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
    holds: type[T]
    read: Callable[[Path], T] | None
    write: Callable[[T, Path], None]
    usage: Callable[[AdapterCard], str]
    peft_type: str = ""
    suffix: str = ""


@dataclass(frozen=True)
class AdapterCard:
    """The contents of a card.

    Attributes:
        format: of the adapter.
        variant: of the adapter; None: it is a plain LoRA.
        r: its block sizes, or the rank.
        targets: names of the adapted layers, or a pattern.
        base: folder or hub id of the base model, if known.
        linear_only: it adapts linear layers, and nothing else; a LoRA: and holds nothing else.
        fits_lora: a LoRA has a place for all that it adapts.
        fits_rwkv: it adapts linear layers of RWKV, by the names of RWKV's own checkpoints.
        is_rwkv: the names are those of RWKV's own checkpoints as they are: flashbone's classes have these, no others.
        task_type: PEFT's, such as "SEQ_CLS".
        architecture: the class of the base, as in its config.json; empty: none of transformers; None: not known.
        labels: how many classes its head tells apart.
        tags: for the hub, besides ours.
    """

    format: AdapterFormat
    variant: str | None
    r: tuple[int, ...]
    targets: tuple[str, ...]
    base: str | None
    linear_only: bool = False
    fits_lora: bool = False
    fits_rwkv: bool = False
    is_rwkv: bool = False
    task_type: str | None = None
    architecture: str | None = None
    labels: int | None = None
    tags: tuple[str, ...] = ()

    @property
    def has_gguf_base(self) -> bool:
        """Whether the base is a `.gguf` file, which transformers dequantises."""
        return bool(self.base and self.base.endswith(".gguf"))

    @property
    def has_pth_base(self) -> bool:
        """Whether the base is an RWKV model's `.pth` file, as far as is known."""
        return self.base.endswith(".pth") if self.base else self.is_rwkv
