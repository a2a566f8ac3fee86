"""The one comparison of the test-suite, with its one table of tolerances."""

import torch
from torch import Tensor

# RMS error over RMS of the wanted values. tests/ops/test_comparison.py shows for each that wrong answers fail.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def relative_error(got: Tensor, want: Tensor) -> float:
    """RMS of the error over RMS of `want`; NaN where either holds NaN or the shapes differ."""
    if got.shape != want.shape:
        return float("nan")
    got, want = got.detach().double(), want.detach().double()
    if not want.numel():
        return 0.0
    scale = want.square().mean().sqrt()
    error = (got - want).square().mean().sqrt()
    return float(error / scale) if scale > 0 else float(error)


def close(got: Tensor, want: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether `got` equals `want` to the rounding of `dtype` (default: got's)."""
    error = relative_error(got, want)
    tolerance = TOLERANCES[dtype or got.dtype]
    if not error <= tolerance:
        print(f"relative error {error:.3g}, tolerance {tolerance:.3g}, shapes {tuple(got.shape)} {tuple(want.shape)}")
        return False
    return True
