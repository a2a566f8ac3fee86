"""Whether torch.func, tracing or forward-mode AD is at work, which want plain operations instead of our own."""

import torch
from torch.autograd import forward_ad


def are_active() -> bool:
    """Whether any of them runs this code."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
