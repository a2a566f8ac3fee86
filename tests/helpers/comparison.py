"""The two comparisons of the test-suite: `close`, with one table of tolerances, and `same_bits`, with a promise."""

import enum

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


class Promise(enum.Enum):
    """Why two tensors have equal bits on every processor, with any number of threads and any library of kernels."""

    UNTOUCHED = "nothing wrote to the tensor, or what was written was taken back from a copy"
    STORED = "the same bytes were copied, moved, renamed, pickled, or written to a file and read back"
    EXACT = "the arithmetic does not round: integers, masks, zeros, powers of two, reordering, casts of the same values"
    SAME_PRODUCT = "one process ran the same operations on the same values, shapes and strides twice"
    RESUMED = "a run that was stopped and resumed did the same steps as one that was not, on the same machine"


def same_bits(got: Tensor, want: Tensor, promise: Promise) -> bool:
    """Whether two tensors have the same shape, dtype and values; tests/test_promises.py refuses a bare `torch.equal`.

    Products of other shapes, other threads, other kernels or another process are compared with `close`.
    """
    assert isinstance(promise, Promise)
    return got.dtype == want.dtype and torch.equal(got, want)
