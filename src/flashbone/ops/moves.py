"""What the active adapters do to one call of a layer: shift the input, the output, or the weight.

All moves are linear in what they shift and refer to the pristine base, so that their order never matters:

    y = base(x + sum z_i) + sum u_i + x (sum dW_i)^T

Each variant adds its moves. The layer then runs them: blocks of one size that see the same x are summed first, so that
ten adapters cost one product; input shifts come before the one base call, output shifts after it, in place where the
base's output is nobody else's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashbone.ops import backend, transforms
from flashbone.ops.bat_col import bat_col_linear, bat_col_linear_refetched, shifted_weight
from flashbone.ops.bat_row import shift_input
from flashbone.ops.bone import add_factored, bounded_sum
from flashbone.ops.cache import NOTHING, Kept
from flashbone.ops.inputs import compute_dtype, compute_input, flat, overflow_unit, scaled
from flashbone.ops.rotation import rotate_input, rotation_offset
from flashbone.ops.tiles import add_tiles

# In inference a shifted weight is kept for calls with fewer tokens than this times r: with more, rebuilding it is a
# small part of the call.
KEPT_BELOW_TOKENS_PER_R = 4

_Terms = list[tuple[Tensor, float]]  # blocks of one shape, each with its scale
_Rotations = list[tuple[Tensor, float, bool, float]]  # block, scale, use_orthogonal, eps


class Moves:
    """The sum of the moves of one layer call; `x` (..., in) is the pristine input.

    Args:
        x: The input.
        kept: What the model's call keeps of blocks and weights, in inference; None in training.
        backend_name: Who computes shard sums and input shifts, see `ops.backend`.
    """

    def __init__(self, x: Tensor, kept: Kept | None = None, backend_name: str = "torch") -> None:
        self.x = x
        self._flat_x: Tensor | None = None
        self._kept = kept
        self._backend, self._is_torch = backend.get(backend_name), backend_name == "torch"
        # Of each kind: (identity of the x that it sees, sizes of the block) -> that x and the blocks.
        self._input_shifts: dict[Any, tuple[Tensor, _Terms]] = {}
        self._rotations: dict[Any, tuple[Tensor, _Rotations]] = {}
        self._factors: dict[Any, tuple[Tensor, _Terms]] = {}
        self._tiled_factors: dict[Any, tuple[Tensor, _Terms]] = {}
        self._weight_shifts: dict[int, tuple[Tensor, dict[int, _Terms]]] = {}
        # These want plain operations without side effects; what they compute with is no tensor to be kept.
        self._has_grad = torch.is_grad_enabled()
        self._transformed = transforms.are_active()
        self._functional = self._transformed or torch.compiler.is_compiling()
        if self._transformed:
            self._kept = None
        # Inference needs no operators, whose dispatch costs as much as a small product.
        self._composite = self._transformed or self._kept is not None
        self._kept_weight: tuple[Tensor, Tensor | None] | None = None  # the shifted one, where that is all

    def add_input_shift(self, x: Tensor, D: Tensor, scale: float) -> None:
        """bat-row: shifts the input by z, and the output by the tiled sum of z."""
        self._input_shifts.setdefault((id(x), D.shape[-1]), (x, []))[1].append((D, scale))

    def add_rotation(self, x: Tensor, P: Tensor, scale: float, use_orthogonal: bool, eps: float) -> None:
        """orthogonal: shifts the input by `scale (Q - I)` in every whole shard; see `ops.rotation`."""
        terms = self._rotations.setdefault((id(x), P.shape[-1]), (x, []))[1]
        terms.append((P, scale, use_orthogonal, eps))

    def add_factors(self, x: Tensor, B: Tensor, scale: float) -> None:
        """bone: shifts the output by `scale * S(x) B`."""
        self._factors.setdefault((id(x), B.shape[0]), (x, []))[1].append((B, scale))

    def add_tiled_factors(self, x: Tensor, B: Tensor, scale: float) -> None:
        """mini: shifts the output by `scale * S(x) B`, tiled along the output."""
        self._tiled_factors.setdefault((id(x), *B.shape), (x, []))[1].append((B, scale))

    def add_weight_shift(self, x: Tensor, D: Tensor, scale: float) -> None:
        """bat-col: shifts the weight that x sees by `scale (W D + D)`."""
        self._weight_shifts.setdefault(id(x), (x, {}))[1].setdefault(D.shape[-1], []).append((D, scale))

    def run(
        self,
        base: Callable[[Tensor], Tensor],
        weight: Callable[[], tuple[Tensor, Tensor | None]],
        is_plain_base: bool = True,
        refetch: bool = False,
    ) -> Tensor:
        """The layer's output. `base(x)` calls the base layer, `weight()` gives its W (out, in) and bias.

        `weight` is called only where a weight is shifted. Where the base is nothing but `x W^T + bias`
        (`is_plain_base`), its output is overwritten, and one weight-shifted GEMM replaces its call unless something
        shifts the input; else the shift of the weight acts on the pristine x, in a GEMM of its own.

        `refetch`: W costs memory while it is there (gathered, dequantised): the base is always called, `weight` once
        more in backward, and nothing of W's size is kept, in inference neither.
        """
        is_plain_base = is_plain_base and not refetch
        base_x = self.begin()
        if self._weight_shifts:
            y, own = self._weight_shifted_call(base_x, base, weight, is_plain_base, refetch)
        else:
            y, own = self._base_call(base_x, base, is_plain_base)
        own = own and not self._functional and not (self._has_grad and y._is_view())
        rows = self._add_shifts(flat(y), own)
        if self.x.ndim == 2:
            return rows
        if own and y.ndim == self.x.ndim:
            return y  # its rows were overwritten
        shape = self.x.shape
        if self._functional or not self._has_grad:
            return rows.view(*shape[:-1], rows.shape[-1])  # a Size as a single argument would take twice the time
        # Not a view for autograd, as what F.linear returns: whoever overwrites it later pays nothing extra in backward.
        return torch.ops.aten._unsafe_view(rows, [*shape[:-1], rows.shape[-1]])

    @property
    def shifts_weight(self) -> bool:
        """Whether any adapter shifts the weight."""
        return bool(self._weight_shifts)

    @property
    def only_term(self) -> tuple[tuple, Any] | None:
        """The kind and the sizes of its only term, and that in a list; None where it has several, where the term sees
        another x or shifts as `bat-*` do, or where another backend was asked for by name."""
        kinds = (("bone", self._factors), ("mini", self._tiled_factors), ("orthogonal", self._rotations))
        groups = [((kind, *key[1:]), *group) for kind, by_key in kinds for key, group in by_key.items()]
        if len(groups) != 1 or self._input_shifts or self._weight_shifts or not self._is_torch:
            return None
        ((key, x, terms),) = groups
        return (key, terms) if x is self.x and len(terms) == 1 else None

    def planned(self, base: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], int] | None:
        """After `run` with a plain base, in inference: what does the same to another x (tokens, in) of that dtype, with
        the blocks as they were combined, cast and solved for; and how many tokens are too many for it.

        None where there are several terms, a cast of x, or a ragged shard, for which each call decides anew.
        """
        kinds = self._factors, self._tiled_factors, self._input_shifts, self._rotations, self._weight_shifts
        groups: list[tuple[Tensor, Any]] = [group for kind in kinds for group in kind.values()]
        x, kept, size = self.x, self._kept, self.x.shape[-1]
        if kept is None or kept is NOTHING or not self._is_torch or type(x) is not Tensor:
            return None
        if len(groups) > 1 or groups[0][0] is not x:
            return None
        if self._weight_shifts:
            if self._kept_weight is None:
                return None
            W, bias = self._kept_weight
            return lambda x: linear(x, W, bias), KEPT_BELOW_TOKENS_PER_R * sum(groups[0][1])
        terms = groups[0][1]
        r = terms[0][0].shape[-2]
        if size % r or x.dtype == torch.float16 or compute_dtype(x) != x.dtype:
            return None
        return self._as_function(base, terms, r, size // r), sys.maxsize

    def _as_function(self, base: Callable[[Tensor], Tensor], terms: Any, r: int, n: int) -> Callable[[Tensor], Tensor]:
        dtype, unscaled = self.x.dtype, [(terms, 1)]
        if self._rotations:
            E = self.offset(terms, dtype)
            return lambda x: base(rotate_input(x, E, composite=True))
        if self._input_shifts:
            D = self._combined(("bat-row", r), unscaled, dtype)

            def shift(x: Tensor) -> Tensor:
                base_x, z_sum = shift_input(x, D, composite=True)
                return add_tiles(base(base_x), z_sum, in_place=True)

            return shift
        ones = self.x.new_ones(1, n)

        def sums(x: Tensor) -> Tensor:
            return ones.mm(x.reshape(n, r)) if len(x) == 1 else bounded_sum(x, r)

        if self._factors:
            B = self._combined("bone", unscaled, dtype)
            return lambda x: add_factored(base(x), sums(x), B, in_place=True)
        B = self._combined(("mini", r, terms[0][0].shape[-1]), unscaled, dtype)
        return lambda x: add_tiles(base(x), sums(x).mm(B), in_place=True)

    def begin(self) -> Tensor | None:
        """Compute what precedes the base call; what the base is to see, (tokens, in), None for the pristine input."""
        # Before the base call, so that in backward the base's gradient of x is there first and these are added to it.
        sums = self._sums = []
        for (_, r), (x, terms) in self._factors.items():
            unit = overflow_unit(x, r)
            sums.append((self._sum(x, r, unit), (terms, unit)))
        self._tiles = self._tiled_sums() if self._tiled_factors else []
        base_x = self._shifted_input() if self._input_shifts else None
        return self._rotated_input(base_x) if self._rotations else base_x

    def finish(
        self, y: Tensor, weight: Callable[[], tuple[Tensor, Tensor | None]], own: bool, refetch: bool = False
    ) -> Tensor:
        """After `begin`: the base's output y (tokens, out) with everything added; if `own`, in place."""
        for x, terms in self._weight_shifts.values():
            shift = self._shift_of_weight(x, y.dtype, weight, terms, refetch)
            y = y.add_(shift) if own else y + shift
        return self._add_shifts(y, own)

    def _add_shifts(self, y: Tensor, own: bool) -> Tensor:
        if sums := self._sums:
            s = sums[0][0] if len(sums) == 1 else torch.cat([s for s, _ in sums], -1)
            B = self._combined("bone", [terms for _, terms in sums], y.dtype)
            y, own = add_factored(y, s, B, own), not self._functional
        for t in self._tiles:
            y, own = add_tiles(y, t, own), not self._functional
        return y

    def _sum(self, x: Tensor, r: int, unit: int) -> Tensor:
        """S(x) / unit, (tokens, r)."""
        size, kept = x.shape[-1], self._kept
        if kept is None or kept is NOTHING or size % r or unit > 1 or x.numel() != size or not self._is_torch:
            return self._backend.bounded_sum(self._rows(x) if self._has_grad else x, r, unit)
        # Of one token, in decoding: a product with ones takes half the time of a sum.
        n = size // r
        return kept.get(("ones", n, x.dtype), lambda: x.new_ones(1, n)).mm(x.reshape(n, r))

    def _rows(self, x: Tensor) -> Tensor:
        """x as (tokens, in); the layer's own input is flattened once."""
        if x is not self.x:
            return flat(x)
        if self._flat_x is None:
            self._flat_x = flat(x)
        return self._flat_x

    def _tiled_sums(self) -> list[Tensor]:
        tiles = []
        for (_, r, width), (x, terms) in self._tiled_factors.items():
            unit = overflow_unit(x, r)
            s = self._sum(x, r, unit)
            tiles.append(s.mm(self._combined(("mini", r, width), [(terms, unit)], s.dtype)))
        return tiles

    def _shifted_input(self) -> Tensor | None:
        """What the base is to see, (tokens, in), None where that is the pristine input; the sums of z become tiles."""
        base_x = None
        for (_, r), (seen, terms) in self._input_shifts.items():
            x = compute_input(self._rows(seen))
            if base_x is None and seen is not self.x:
                base_x = compute_input(self._rows(self.x))
            D = self._combined(("bat-row", r), [(terms, 1)], x.dtype)
            composite = self._composite if self._is_torch else self._transformed
            base_x, z_sum = self._backend.shift_input(x, D, base_x, composite)
            self._tiles.append(z_sum)
        return base_x

    def _rotated_input(self, base_x: Tensor | None) -> Tensor | None:
        """As `_shifted_input`, which went before: `base_x` is what it left."""
        for seen, terms in self._rotations.values():
            x = compute_input(self._rows(seen))
            if base_x is None and seen is not self.x:
                base_x = compute_input(self._rows(self.x))
            base_x = rotate_input(x, self.offset(terms, x.dtype), base_x, self._composite)
        return base_x

    def offset(self, terms: _Rotations, dtype: torch.dtype) -> Tensor:
        """The sum of the scaled `Q - I` of several adapters, solved for once in inference."""

        def build() -> Tensor:
            offsets = [scaled(rotation_offset(P, is_rotation, eps), scale) for P, scale, is_rotation, eps in terms]
            return sum(offsets[1:], offsets[0]).to(dtype)

        if self._kept is None:
            return build()
        settings = tuple(term[1:] for term in terms)
        return self._kept.get(("orthogonal", terms[0][0].shape[-1], dtype, settings), build)

    def _base_call(self, base_x: Tensor | None, base: Callable, is_plain: bool) -> tuple[Tensor, bool]:
        """The base's output; and whether it is ours alone, to be overwritten."""
        if is_plain and type(self.x) in (Tensor, torch.nn.Parameter):
            if base_x is None:  # as rows where autograd would see that a view of the output is overwritten
                as_it_is = not (self._has_grad or self._functional) and self.x.is_contiguous()
                base_x = self.x if as_it_is else self._rows(self.x)
            return base(base_x), True
        # In the dtype of x: some quantised layers know nothing of autocast.
        return base(self.x if base_x is None else base_x.view(self.x.shape).to(self.x.dtype)), False

    def _weight_shifted_call(
        self, base_x: Tensor | None, base: Callable, weight: Callable, is_plain: bool, refetch: bool
    ) -> tuple[Tensor, bool]:
        """As `_base_call`, with every shift of the weight."""
        shifts = dict(self._weight_shifts)
        if base_x is None and is_plain and id(self.x) in shifts:
            x, terms = shifts.pop(id(self.x))
            W, bias = weight()
            y = self._weight_shifted(compute_input(x), W, bias, terms, with_base=True)
        else:
            y = self._base_call(base_x, base, is_plain)[0]
        for x, terms in shifts.values():
            y = y + self._shift_of_weight(x, y.dtype, weight, terms, refetch).view(y.shape)
        return y, True

    def _shift_of_weight(
        self, x: Tensor, dtype: torch.dtype, weight: Callable, shifts: dict[int, _Terms], refetch: bool
    ) -> Tensor:
        """`x dW^T` (tokens, out)."""
        if not refetch:
            return self._weight_shifted(x.to(dtype), weight()[0], None, shifts, with_base=False)
        blocks = [_combine([(terms, 1)], terms[0][0].dtype) for terms in shifts.values()]
        x = flat(x.to(dtype))
        return bat_col_linear_refetched(x, lambda: weight()[0], None, blocks, False, composite=self._transformed)

    def _weight_shifted(
        self, x: Tensor, W: Tensor, bias: Tensor | None, shifts: dict[int, _Terms], with_base: bool
    ) -> Tensor:
        """`x W'^T + bias` (tokens, out)."""
        x = flat(x)

        def blocks() -> list[Tensor]:
            return [_combine([(terms, 1)], W.dtype) for terms in shifts.values()]

        key = "bat-col", with_base, x.dtype, tuple((r, scale) for r, terms in shifts.items() for _, scale in terms)
        if (
            self._kept is None
            or not self._kept.keeps_weights
            or x.shape[0] >= KEPT_BELOW_TOKENS_PER_R * sum(shifts)
            or not self._kept.is_worth_keeping(key)
        ):
            return bat_col_linear(x, W, bias, blocks(), with_base, composite=self._composite)
        W_shifted = self._kept.get(key, lambda: shifted_weight(W, blocks(), with_base).to(x.dtype))
        bias = None if bias is None else bias.to(x.dtype)
        self._kept_weight = W_shifted, bias
        return linear(x, W_shifted, bias)

    def _combined(self, role: Hashable, groups: list[tuple[_Terms, int]], dtype: torch.dtype) -> Tensor:
        """Blocks times their scales, summed in each group and times its unit, the groups side by side along axis 0."""
        if len(groups) == len(groups[0][0]) == 1:
            ((block, scale),), unit = groups[0]
            if block.dtype == dtype:
                return scaled(block, scale * unit)
        if self._kept is None:
            return _combine(groups, dtype)
        settings = tuple((unit, *(scale for _, scale in terms)) for terms, unit in groups)
        return self._kept.get((role, dtype, settings), lambda: _combine(groups, dtype))


def _combine(groups: list[tuple[_Terms, int]], dtype: torch.dtype) -> Tensor:
    sums = []
    for terms, factor in groups:
        first, *others = (scaled(block, scale * factor) for block, scale in terms)
        total = sum(others, first) if others else first
        sums.append(total if total.dtype == dtype else total.to(dtype))
    return sums[0] if len(sums) == 1 else torch.cat(sums)
