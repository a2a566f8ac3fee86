"""What may not happen to a base while adapters are merged into it: unmerging would silently drop what was written."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flashbone.errors import ConfigError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(tensor: Tensor) -> tuple[torch.dtype, list[Tensor]]:
    """Sums of the tensor's bits along rows and columns, in host memory: a write changes them, a move does not."""
    if is_traceable_wrapper_subclass(tensor):  # torchao's
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return tensor.dtype, [part for inner in parts if isinstance(inner, Tensor) for part in fingerprint(inner)[1]]
    if tensor.is_meta or tensor.itemsize not in _INTEGERS:
        return tensor.dtype, []
    matrix = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    size, width = tensor.itemsize, matrix.shape[1] * tensor.itemsize
    is_even = width > 0 and width % 8 == 0  # sums of int64 are 20 times as fast
    starts = int(matrix.stride(0)), int(matrix.storage_offset())
    if is_even and not (matrix.is_contiguous() and all(start * size % 8 == 0 for start in starts)):
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    bits = matrix.view(torch.int64 if is_even else _INTEGERS[size])
    return tensor.dtype, [bits.sum(axis, dtype=torch.int64).cpu() for axis in (0, 1)]


def is_written(tensor: Tensor, before: tuple[torch.dtype, list[Tensor]] | None) -> bool:
    """Whether a tensor was written to since its `fingerprint`; a cast, which cannot be compared, is no write."""
    if before is None or before[0] != tensor.dtype:
        return False
    now = fingerprint(tensor)[1]
    return len(now) == len(before[1]) and not all(map(torch.equal, now, before[1]))


def check_loadable(model: nn.Module, state_dict: Container[str], prefix: str) -> None:
    """Check that a state dict holds no weight into which adapters are merged, before anything of it is loaded.

    Raises:
        ConfigError: it does.
    """
    merged: list[tuple[str, Any]] = [
        (f"{prefix}{name}." if name else prefix, module)
        for name, module in model.named_modules()
        if getattr(module, "merged_adapters", None) and hasattr(module, "base_parameter")
    ]
    keys = [
        f"{path}{name}"
        for path, module in merged
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter is module.base_parameter() and f"{path}{name}" in state_dict
    ]
    if keys:
        others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        raise ConfigError(
            f"state dict: it holds {keys[0]}{others}, and adapters are merged there, so that unmerging would drop what"
            " is loaded; call unmerge_adapter() first"
        )


def check_not_written(layer: Any) -> None:
    """
    Raises:
        ConfigError: adapters are merged, and the base's parameter was written to since.
    """
    if layer.merged_adapters and is_written(layer.base_parameter(), layer.merged_bits):
        raise ConfigError(
            f"the base was written to while {', '.join(map(repr, layer.merged_adapters))} is merged into it, which"
            " unmerging would drop; merge_and_unload() keeps it, unmerge_adapter(discard_writes=True) drops it"
        )
