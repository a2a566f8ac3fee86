"""Two moves as Triton kernels, for GPUs: the shard sum, and the input shift with its sum. Asked for by name.

Nothing else of flashbone imports this package; docs/triton.md says what is fused and what has been checked.
"""

from flashbone.errors import BackendError

try:
    import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise BackendError(
        "backend 'triton': the package triton cannot be imported; install it (`pip install triton`, Linux), or use the "
        "backend 'torch'"
    ) from error

from flashbone.ops.triton.launch import shard_sum, shift_input

__all__ = ["shard_sum", "shift_input"]
