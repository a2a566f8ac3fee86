"""Who computes the shard sum and the input shift: plain torch, or, where asked for by name, Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from flashbone.errors import BackendError, ConfigError
from flashbone.ops.bat_row import shift_input
from flashbone.ops.bone import bounded_sum
from flashbone.ops.inputs import flat


class Backend(NamedTuple):
    """The two moves that have kernels; contracts: `ops.bone.bounded_sum`, `ops.bat_row.shift_input`."""

    bounded_sum: Callable[[Tensor, int, int], Tensor]
    shift_input: Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor]]


BACKENDS = {"torch": Backend(bounded_sum, shift_input)}
KNOWN = ("torch", "triton")


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ConfigError: there is none.
        BackendError: "triton" without the package.
    """
    if name not in KNOWN:
        raise ConfigError(f"backend: got {name!r}, wanted one of {', '.join(map(repr, KNOWN))}")
    if name not in BACKENDS:
        BACKENDS[name] = _triton()
    return BACKENDS[name]


def _triton() -> Backend:
    from flashbone.ops import triton

    def shift(x: Tensor, D: Tensor, base_x: Tensor | None, composite: bool) -> tuple[Tensor, Tensor]:
        if composite:
            raise BackendError("backend 'triton': torch.func, tracing and forward-mode AD need the backend 'torch'")
        shifted, z_sum = triton.shift_input(x if base_x is None else base_x, x, D, 1.0)
        assert z_sum is not None
        return shifted, z_sum

    return Backend(lambda x, r, divisor: triton.shard_sum(flat(x), r, divisor), shift)
