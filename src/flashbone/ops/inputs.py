"""What moves compute with: inputs in the base's dtype, seen as rows of tokens; blocks times their scales."""

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from flashbone import shards


def scaled(block: Tensor, scale: float) -> Tensor:
    """`scale * block`, the block itself at 1."""
    return block if scale == 1 else block * scale


def flat(x: Tensor) -> Tensor:
    """(tokens, in)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives to the base's GEMM."""
    if x.dtype != torch.float64 and torch._C._is_any_autocast_enabled():  # the cheapest question first
        kind = x.device.type
        if is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return x.dtype


def compute_input(x: Tensor) -> Tensor:
    """x in that dtype."""
    dtype = compute_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)


def overflow_unit(x: Tensor, r: int) -> int:
    """What S(x) is divided by, and B multiplied with: in fp16 a power of two of at least the number of shards, so that
    the sum stays in range; a power of two rounds nothing."""
    return 1 << (shards.count(x.shape[-1], r) - 1).bit_length() if compute_dtype(x) == torch.float16 else 1
