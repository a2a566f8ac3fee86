"""Gradient checkpointing under both names that transformers has had for it."""

from typing import Any


def enable_checkpointing(model: Any, use_reentrant: bool = False) -> None:
    """Turn gradient checkpointing on; older versions of transformers have the older name alone."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
