"""What a trained method takes on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashbone.errors import ConfigError

if TYPE_CHECKING:
    from flashbone.compare.methods.registry import Method


def save(model: Any, method: Method, folder: str | Path) -> int:
    """Save the adapter in PEFT's format, as safetensors; the bytes of its tensors' and its configuration's files.

    Raises:
        ConfigError: the method is a bound, which has no adapter.
    """
    if method.is_bound:
        raise ConfigError(f"{method.name}: it has no adapter to save; adapter_bytes tells its size")
    # Otherwise PEFT looks up the base's vocabulary on the hub, to see whether it has grown.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return sum(file.stat().st_size for file in Path(folder).glob("adapter_*"))


def adapter_bytes(model: Any) -> int:
    """Bytes of the parameters that train."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
