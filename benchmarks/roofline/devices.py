"""What devices can do: peaks of data sheets, and those of this CPU as measured on the spot."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.roofline.kernels import Kernel

# What large kernels reach of a data sheet's peaks: assumed, for every GPU alike.
REACHED_OF_PEAK, REACHED_OF_BANDWIDTH = 0.7, 0.85


@dataclass(frozen=True)
class Device:
    """A roofline.

    Attributes:
        name: As a person calls it.
        operations_per_s: dtype -> of dense products.
        bytes_per_s: (bytes of a kernel, bytes a second) in rising order; caches make small kernels faster.
        launch_s: From one launch to the next. A GPU hides it behind a longer kernel, a CPU (`is_serial`) does not.
    """

    name: str
    operations_per_s: dict[str, float]
    bytes_per_s: tuple[tuple[float, float], ...]
    launch_s: float
    is_serial: bool = False

    def time_s(self, kernel: Kernel) -> float:
        """The predicted time of a kernel."""
        peak = self.operations_per_s.get(kernel.dtype, self.operations_per_s["float32"])
        place = min(bisect.bisect_left(self.bytes_per_s, (kernel.bytes, 0)), len(self.bytes_per_s) - 1)
        work_s = max(kernel.operations / peak, kernel.bytes / self.bytes_per_s[place][1])
        return self.launch_s + work_s if self.is_serial else max(self.launch_s, work_s)


def _gpu(name: str, gb_per_s: float, tflops_bf16: float, tflops_fp32: float) -> Device:
    peaks = {"bfloat16": tflops_bf16, "float32": tflops_fp32}
    reached = {dtype: peak * 1e12 * REACHED_OF_PEAK for dtype, peak in peaks.items()}
    return Device(name, reached, ((float("inf"), gb_per_s * 1e9 * REACHED_OF_BANDWIDTH),), launch_s=5e-6)


# Dense peaks of the makers' data sheets; fp32 without TF32.
GPUS = {
    "a100": _gpu("A100 80 GB", 2039, 312, 19.5),
    "h100": _gpu("H100 SXM", 3350, 989, 67),
    "h200": _gpu("H200", 4800, 989, 67),
    "l4": _gpu("L4", 300, 121, 30.3),
    "rtx4090": _gpu("RTX 4090", 1008, 165, 82.6),
}


def measured(device: str, threads: int, dtype: str) -> Device:
    """The roofline of this machine's "cpu" or "cuda": the fastest of a few products, of sums of several sizes, and of
    calls of a tiny layer."""
    import torch

    torch.set_num_threads(threads)
    wide = 4096 if device == "cuda" else 1024
    with torch.device(device):
        peaks = {name: _product_peak(torch, getattr(torch, name), wide, device) for name in {dtype, "float32"}}
        bandwidths = tuple(_bandwidths(torch, device))
        return Device(f"this {device}", peaks, bandwidths, _launch_s(torch, device), is_serial=device == "cpu")


def _product_peak(torch: Any, dtype: Any, wide: int, device: str) -> float:
    x, W = torch.randn(512, wide).to(dtype), torch.randn(wide, wide).to(dtype)
    return 2 * 512 * wide**2 / _fastest_s(lambda: x @ W, device)


def _bandwidths(torch: Any, device: str) -> list[tuple[float, float]]:
    found = []
    for size in (2**16, 2**20, 2**22, 2**24, 2**26):  # bytes of each of two tensors
        a, b = torch.randn(size // 4), torch.randn(size // 4)
        found.append((2.0 * size, 2 * size / _fastest_s(lambda a=a, b=b: torch.add(a, 1.0, out=b), device)))
    return found


def _launch_s(torch: Any, device: str) -> float:
    """Of a kernel with what autograd does for it: a tiny layer has one forward and one backward."""
    layer, x = torch.nn.Linear(8, 8, bias=False).requires_grad_(False), torch.randn(8, 8, requires_grad=True)
    gradient = torch.randn(8, 8)

    def call() -> None:
        for _ in range(100):
            x.grad = None
            layer(x).backward(gradient)

    return _fastest_s(call, device) / 100 / 2


def _fastest_s(call: Callable[[], Any], device: str, times: int = 7) -> float:
    from benchmarks.timing import timed_ms

    call()
    return min(timed_ms(call, device) for _ in range(times)) / 1e3
