"""The peak of a process's memory, of what CUDA allocated where that is the device."""

from __future__ import annotations

from pathlib import Path

import torch


def reset_peak(device: str) -> None:
    """Let the peak be what is held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now


def peak_mib(device: str) -> float:
    """The peak since then."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
