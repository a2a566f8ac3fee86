"""The clock of the workers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch


def timed_ms(call: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Milliseconds per call, without the collector of garbage; CUDA is waited for at both ends."""
    gc.disable()
    try:
        _wait_for(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait_for(device)
        return (time.perf_counter() - start) * 1e3 / calls
    finally:
        gc.enable()


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
