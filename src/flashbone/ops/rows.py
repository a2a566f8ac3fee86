"""A batch whose rows belong to different adapters: the base runs once, and each adapter touches its rows only.

In inference the adapters of one kind and size are one batched product: their blocks are stacked for the time of the
model's call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashbone.ops import transforms
from flashbone.ops.bone import bounded_sum
from flashbone.ops.cache import Kept
from flashbone.ops.inputs import compute_input, flat, overflow_unit, scaled
from flashbone.ops.moves import Moves
from flashbone.ops.tiles import add_tiles


class Part(NamedTuple):
    """Rows `start` to `start + size` of a batch, and the moves of their adapter, which see these rows of the input."""

    start: int
    size: int
    moves: Moves
    name: str = ""


def run_by_rows(
    x: Tensor,
    parts: Sequence[Part],
    base: Callable[[Tensor], Tensor],
    weight: Callable[[], tuple[Tensor, Tensor | None]],
    is_plain_base: bool,
    refetch: bool = False,
    kept: Kept | None = None,
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
        kept: What the model's call keeps for all rows; None where a backward may follow.
    """
    is_flat = is_plain_base and type(x) in (Tensor, torch.nn.Parameter)
    # Their one product with the shifted weight is all that these rows need; the others see the base.
    replaced = [part for part in parts if is_flat and not refetch and part.moves.shifts_weight]
    parts = [part for part in parts if part not in replaced]
    groups: list[_Group] = []
    if is_flat and kept is not None and not transforms.are_active():
        groups, parts = _joined(parts, kept)
    shifts = [(group, group.shift(x)) for group in groups]  # of all of them before x is shifted by some
    shifted = [(part, base_x) for part in parts if (base_x := part.moves.begin()) is not None]
    pieces = [(part, base_x.view(x[: part.size].shape)) for part, base_x in shifted]
    pieces += [(group, z) for group, z in shifts if group.shifts_input]
    if pieces:
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
    y = y if own else _assembled(y, finished)
    for group, shift in shifts:
        if not group.shifts_input:
            add_tiles(flat(y.narrow(0, group.start, group.size)), shift.to(y.dtype), in_place=True)
    return y


class _Group(NamedTuple):
    """Adjacent parts with one adapter each, of one kind and size: one product for all of them.

    Attributes:
        kind: "bone", "mini" or "orthogonal", and the sizes of the block.
        terms: The only one of each part, see `Moves.only_term`.
    """

    start: int
    size: int
    kind: tuple
    parts: list[Part]
    terms: list[tuple]
    kept: Kept

    @property
    def shifts_input(self) -> bool:
        """Whether `shift` returns what the base is to see, not what is added to its output."""
        return self.kind[0] == "orthogonal"

    def shift(self, x: Tensor) -> Tensor:
        """What the adapters do to their rows of x (rows, ..., in): the input of the base in the shape of x, or a shift
        of its output, (tokens, out) or (tokens, width of the tiles)."""
        x = x.narrow(0, self.start, self.size)
        r = self.kind[1]
        if self.shifts_input:
            x = compute_input(x)
            rows = x.reshape(-1, r)
            pairs = zip(self.parts, self.terms, strict=True)
            build = [lambda part=part, term=term: part.moves.offset([term], x.dtype).mT for part, term in pairs]
            return (rows + self._product(rows, build)).view(x.shape)
        unit = overflow_unit(x, r)
        s = compute_input(bounded_sum(x, r, unit))
        build = [lambda B=B, scale=scale: scaled(B, scale * unit).to(s.dtype) for B, scale in self.terms]
        return self._product(s, build)

    def _product(self, t: Tensor, build: Sequence[Callable[[], Tensor]]) -> Tensor:
        """Each part's rows of t (n, k) times its matrix, (n, m)."""
        sizes, width = tuple(part.size for part in self.parts), t.shape[-1]
        count, longest = len(sizes), max(sizes)
        key = (
            "rows",
            self.kind,
            t.dtype,
            sizes,
            *((p.name, *term[1:]) for p, term in zip(self.parts, self.terms, strict=True)),
        )
        # To stack the blocks takes as long as many small products, and padding as long as what it adds.
        if count * longest > 2 * self.size or not (self.kept.keeps_weights and self.kept.is_worth_keeping(key)):
            rows = t.view(self.size, -1).split(sizes)
            return torch.cat([part.view(-1, width).mm(matrix()) for part, matrix in zip(rows, build, strict=True)])
        matrices = self.kept.get(key, lambda: torch.stack([matrix() for matrix in build]))
        if min(sizes) == longest:
            return torch.bmm(t.view(count, -1, width), matrices).flatten(0, 1)

        def indices() -> Tensor:
            """The place of each row once shorter parts are padded; and the row that each place takes."""
            put = [a * longest + i for a, size in enumerate(sizes) for i in range(size)]
            take = [0] * (count * longest)
            for row, place in enumerate(put):
                take[place] = row
            return torch.tensor(put + take, device=t.device)

        put, take = self.kept.get(("padding", sizes), indices).split([self.size, count * longest])
        padded = t.view(self.size, -1).index_select(0, take).view(count, -1, width)
        return torch.bmm(padded, matrices).view(count * longest, -1).index_select(0, put).view(len(t), -1)


def _joined(parts: Sequence[Part], kept: Kept) -> tuple[list[_Group], list[Part]]:
    """Groups of parts that are one product, and the parts that are in none: those with other moves, and those
    apart from the others of their kind."""
    by_kind: dict[tuple, list[tuple[Part, tuple]]] = {}
    rest = []
    for part in parts:
        only = part.moves.only_term
        if only is None:
            rest.append(part)
        else:
            by_kind.setdefault(only[0], []).append((part, only[1][0]))
    groups = []
    for kind, members in by_kind.items():
        of_kind, terms = [part for part, _ in members], [term for _, term in members]
        start, size = of_kind[0].start, sum(part.size for part in of_kind)
        is_adjacent = of_kind[-1].start + of_kind[-1].size == start + size
        fits = kind[0] != "orthogonal" or of_kind[0].moves.x.shape[-1] % kind[1] == 0
        if len(of_kind) > 1 and is_adjacent and fits:
            groups.append(_Group(start, size, kind, of_kind, terms, kept))
        else:
            rest += of_kind
    return groups, sorted(rest, key=lambda part: part.start)


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


def _assembled(t: Tensor, replaced: Sequence[tuple[Part | _Group, Tensor]]) -> Tensor:
    """t with the rows of some parts replaced; a new tensor."""
    pieces, end = [], 0
    for part, rows in sorted(replaced, key=lambda pair: pair[0].start):
        pieces += [t[end : part.start], rows]
        end = part.start + part.size
    return torch.cat([*pieces, t[end:]])
