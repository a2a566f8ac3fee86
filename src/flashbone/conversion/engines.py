"""The serving engines: what LoRA each takes, what it wants to find, and how it is told of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashbone.checkpoint.lora import Lora


@dataclass(frozen=True)
class Engine:
    """A serving engine.

    Attributes:
        name: as users write it.
        formats: that it takes, the preferred first.
    """

    name: str
    formats: tuple[str, ...]

    def prepare(self, lora: Lora, where: Path) -> Lora:
        """The LoRA as the engine takes it, padded to an allowed rank; what it cannot take is refused."""
        raise NotImplementedError

    def write_extras(self, lora: Lora, folder: Path) -> tuple[str, ...]:
        """Write what else the engine wants to find; the names of the files."""
        raise NotImplementedError

    def command(self, lora: Lora, out: Path) -> str:
        """How it is started with the adapter."""
        raise NotImplementedError


def get(name: str) -> Engine:
    """The engine of that name."""
    raise NotImplementedError
