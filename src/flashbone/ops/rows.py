"""A batch whose rows belong to different adapters: the base runs once, and each adapter touches its rows only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashbone.ops import transforms
from flashbone.ops.inputs import compute_input, flat
from flashbone.ops.moves import Moves


class Part(NamedTuple):
    """Rows `start` to `start + size` of a batch, and the moves of their adapter, which see these rows of the input."""

    start: int
    size: int
    moves: Moves


def run_by_rows(
    x: Tensor,
    parts: Sequence[Part],
    base: Callable[[Tensor], Tensor],
    weight: Callable[[], tuple[Tensor, Tensor | None]],
    is_plain_base: bool,
    refetch: bool = False,
) -> Tensor:
    """The output of a layer for x (rows, ..., in); rows that are in no part get the base's.

    Args:
        x: The input.
        parts: Without overlap, by increasing start.
        base: Calls the base layer.
        weight: Gives its W (out, in) and bias; called only where a weight is shifted.
        is_plain_base: Whether calling it is `x W^T + bias` and nothing else: its output is overwritten then, where no
            gradient is asked for.
        refetch: Whether W costs memory while it is there, see `Moves.run`.
    """
    is_flat = is_plain_base and type(x) in (Tensor, torch.nn.Parameter)
    # Their one product with the shifted weight is all that these rows need; the others see the base.
    replaced = [part for part in parts if is_flat and not refetch and part.moves.shifts_weight]
    parts = [part for part in parts if part not in replaced]
    shifted = [(part, base_x) for part in parts if (base_x := part.moves.begin()) is not None]
    if shifted:
        pieces = [(part, base_x.view(x[: part.size].shape)) for part, base_x in shifted]
        # A base that is not plain gets the dtype of x: some quantised layers know nothing of autocast.
        x, dtype = _assembled(compute_input(x), pieces), x.dtype
        x = x if is_flat else x.to(dtype)
    if replaced:
        y, own = _beside_replaced(x, replaced, base, weight), True
    else:
        y = base(flat(x)) if is_flat else base(x)
        own = is_flat and not y._is_view()
        y = _shaped(y, x)
    own = own and not (torch.is_grad_enabled() or transforms.are_active())
    finished = []
    for part in parts:
        rows = y.narrow(0, part.start, part.size)
        finished.append((part, part.moves.finish(flat(rows), weight, own, refetch).view(rows.shape)))
    return y if own else _assembled(y, finished)


def _beside_replaced(x: Tensor, replaced: Sequence[Part], base: Callable, weight: Callable) -> Tensor:
    """The base's output, except for rows whose own moves replace it; a new tensor."""
    ends = [0, *(part.start + part.size for part in replaced)]
    starts = [*(part.start for part in replaced), len(x)]
    gaps = [x[end:start] for end, start in zip(ends, starts, strict=True)]
    rest = torch.cat([gap for gap in gaps if len(gap)]) if any(map(len, gaps)) else None
    y_rest = iter(()) if rest is None else iter(_shaped(base(flat(rest)), rest).split([*map(len, gaps)]))
    pieces = [next(y_rest, None)]
    for part in replaced:
        pieces += [part.moves.run(base, weight, True), next(y_rest, None)]
    return torch.cat([piece for piece in pieces if piece is not None])


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """y (tokens, out) in the shape of x (rows, ..., in); either may be empty."""
    return y.view(*x.shape[:-1], y.shape[-1])


def _assembled(t: Tensor, replaced: Sequence[tuple[Part, Tensor]]) -> Tensor:
    """t with the rows of some parts replaced; a new tensor."""
    pieces, end = [], 0
    for part, rows in replaced:
        pieces += [t[end : part.start], rows]
        end = part.start + part.size
    return torch.cat([*pieces, t[end:]])
