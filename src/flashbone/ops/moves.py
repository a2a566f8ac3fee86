"""What the active adapters do to one call of a layer: shift the input, the output, or the weight.

All moves are linear in what they shift and refer to the pristine base, so that their order never matters:

    y = base(x + sum z_i) + sum u_i + x (sum dW_i)^T

Each variant adds its moves; the layer then makes one base call and adds the rest to its output.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flashbone import shards
from flashbone.ops.bat_col import bat_col_linear
from flashbone.ops.bat_row import shift_input
from flashbone.ops.bone import add_factored


class Moves:
    """The sum of the moves of one layer call; `x` (..., in) is the pristine input."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.base_x = x
        self._shared_factors: dict[int, tuple[Tensor, Tensor]] = {}
        self._own_factors: list[tuple[Tensor, Tensor]] = []
        self._tiles: dict[int, Tensor] = {}
        self._fused_shift: tuple[list[Tensor], list[float]] = [], []
        self._own_shifts: list[tuple[Tensor, Tensor, float]] = []

    def add_input_shift(self, x: Tensor, D: Tensor, scale: float) -> None:
        """bat-row: shifts the input by z, and the output by the tiled sum of z."""
        self.base_x, z_sum = shift_input(self.base_x, x, D, scale)
        self._add_tile(z_sum)

    def add_factors(self, x: Tensor, B: Tensor, scale: float) -> None:
        """bone: shifts the output by `scale * S(x) B`. Adapters of one r that see the pristine x share one S(x)."""
        r = B.shape[0]
        if x is self.x and r in self._shared_factors:
            s, other = self._shared_factors[r]
            self._shared_factors[r] = s, other + _times(B, scale * _unit(x, r))
            return
        factors = _bounded_sum(x, r), _times(B, scale * _unit(x, r))
        if x is self.x:
            self._shared_factors[r] = factors
        else:
            self._own_factors.append(factors)

    def add_tiled_factors(self, x: Tensor, B: Tensor, scale: float) -> None:
        """mini: shifts the output by `scale * S(x) B`, tiled along the output."""
        s = _bounded_sum(x, B.shape[0])
        self._add_tile(s @ _times(B, scale * _unit(x, B.shape[0])).to(s.dtype))

    def add_weight_shift(self, x: Tensor, D: Tensor, scale: float) -> None:
        """bat-col: shifts the weight that x sees by `scale (W D + D)`; adapters that see the pristine x share a W'."""
        if x is self.x:
            self._fused_shift[0].append(D)
            self._fused_shift[1].append(scale)
        else:
            self._own_shifts.append((x, D, scale))

    def _add_tile(self, t: Tensor) -> None:
        width = t.shape[-1]
        self._tiles[width] = self._tiles[width] + t if width in self._tiles else t

    def run(
        self,
        base: Callable[[Tensor], Tensor],
        weight: Callable[[], tuple[Tensor, Tensor | None]],
        is_plain_base: Callable[[], bool] = lambda: True,
    ) -> Tensor:
        """The layer's output. `base(x)` calls the base layer, `weight()` gives its W (out, in) and bias.

        `weight` is called only where a weight is shifted. One weight-shifted GEMM replaces the base call where the base
        is nothing but `x W^T + bias` (`is_plain_base()`) and nothing shifts the input; else the shift of the weight
        acts on the pristine x, in a GEMM of its own.
        """
        blocks, scales = self._fused_shift
        if not blocks and not self._own_shifts:
            return self._shift_output(base(self.base_x))
        W, bias = weight()
        if blocks and self.base_x is self.x and is_plain_base():
            y = bat_col_linear(self._compute_input(self.x, W), W, bias, blocks, scales)
        else:
            y = base(self.base_x)
            if blocks:
                y = y + bat_col_linear(self.x.to(y.dtype), W, None, blocks, scales, with_base=False)
        for x, D, scale in self._own_shifts:
            y = y + bat_col_linear(x.to(y.dtype), W, None, [D], [scale], with_base=False)
        return self._shift_output(y)

    @staticmethod
    def _compute_input(x: Tensor, W: Tensor) -> Tensor:
        """x in the dtype that autocast would give to this GEMM."""
        if torch.is_autocast_enabled(x.device.type) and W.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def _shift_output(self, y: Tensor) -> Tensor:
        factors = [*self._shared_factors.values(), *self._own_factors]
        if len(factors) == 1:
            y = add_factored(y, *factors[0])
        elif factors:
            s, B = zip(*factors, strict=True)
            y = add_factored(y, torch.cat(s, -1), torch.cat([b.to(y.dtype) for b in B]))
        for t in self._tiles.values():
            y = shards.add_tiled(y, t.to(y.dtype))
        return y


def _times(B: Tensor, factor: float) -> Tensor:
    return B if factor == 1 else B * factor


def _unit(x: Tensor, r: int) -> int:
    """What S(x) is divided by, and B multiplied with: in fp16 a power of two of at least the number of shards, so that
    the sum stays in range; a power of two rounds nothing."""
    return 1 << (shards.count(x.shape[-1], r) - 1).bit_length() if x.dtype == torch.float16 else 1


def _bounded_sum(x: Tensor, r: int) -> Tensor:
    s, unit = shards.shard_sum(x, r), _unit(x, r)
    return (s / unit).to(x.dtype) if unit > 1 else s.to(x.dtype)
