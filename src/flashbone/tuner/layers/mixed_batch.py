"""Batches with an adapter for each row: PEFT's `adapter_names=[...]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashbone.errors import ConfigError, ShapeError

BASE = "__base__"  # PEFT's name for no adapter


class Group(NamedTuple):
    """The rows of one adapter, which are adjacent after sorting."""

    name: str
    start: int
    size: int


class RowNames:
    """The adapter of each row. All layers share one object during a call of the model, and the orders that it computes.

    Args:
        names: An adapter's name, or `__base__`, for each row.
        repeats: How often generation may repeat each row, for beams or several answers; the copies are adjacent.

    Attributes:
        has_grad: Whether a backward may follow the call.
    """

    def __init__(self, names: Sequence[str], repeats: int = 1) -> None:
        self.names, self._repeats, self.has_grad = list(names), repeats, torch.is_grad_enabled()
        self._sorted: dict[int, tuple[list[Group], list[int] | None]] = {}
        self._orders: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def for_rows(self, rows: int) -> list[str]:
        """The names for an input with this many rows.

        Raises:
            ShapeError: `rows` is neither the number of names nor that number times the repeats.
        """
        if rows == len(self.names):
            return self.names
        if rows == len(self.names) * self._repeats:
            return [name for name in self.names for _ in range(self._repeats)]
        raise ShapeError(
            f"adapter_names: {len(self.names)} names, but a layer gets an input with {rows} rows; name an adapter for"
            " each row of the batch (a layer whose input is not arranged by rows cannot take adapter_names)"
        )

    def groups(self, rows: int) -> list[Group]:
        """A group for each adapter, in order of first use; rows of the base are in none."""
        return self._arranged(rows)[0]

    def sorted(self, x: Tensor) -> Tensor:
        """x with its rows in the order of the groups; x itself where they already are."""
        return x if self._arranged(len(x))[1] is None else x.index_select(0, self._order(x)[0])

    def restored(self, y: Tensor) -> Tensor:
        """The inverse of `sorted`."""
        return y if self._arranged(len(y))[1] is None else y.index_select(0, self._order(y)[1])

    def _arranged(self, rows: int) -> tuple[list[Group], list[int] | None]:
        if rows not in self._sorted:
            names = self.for_rows(rows)
            rank = {name: i for i, name in enumerate(dict.fromkeys(names))} | {BASE: rows}
            order = sorted(range(rows), key=lambda row: rank[names[row]])
            positions: dict[str, list[int]] = {}
            for position, row in enumerate(order):
                positions.setdefault(names[row], []).append(position)
            groups = [Group(name, at[0], len(at)) for name, at in positions.items() if name != BASE]
            self._sorted[rows] = groups, None if order == list(range(rows)) else order
        return self._sorted[rows]

    def _order(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The order and its inverse on t's device."""
        key = len(t), t.device
        if key not in self._orders:
            order = torch.tensor(self._arranged(len(t))[1])
            self._orders[key] = order.to(t.device), order.argsort().to(t.device)
        return self._orders[key]


def row_names(adapter_names: Sequence[str], known: Sequence[str], kwargs: dict[str, Any], model: Any) -> RowNames:
    """The checked `adapter_names` of a call of the model.

    Args:
        adapter_names: An adapter's name, or `__base__`, for each row.
        known: The adapters of the model.
        kwargs: The other arguments of the call; may hold generation's numbers of beams and answers.
        model: The base model; its generation config holds the defaults of these numbers.

    Raises:
        ConfigError: the names are not a list of strings, or an adapter does not exist.
    """
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise ConfigError(f"adapter_names: got {adapter_names!r}, wanted a list with a name for each row of the batch")
    if unknown := [name for name in dict.fromkeys(adapter_names) if name not in known and name != BASE]:
        raise ConfigError(
            f"adapter_names: no {unknown} in this model, which has {list(known)}; {BASE!r} is the model without any"
        )
    defaults = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    counts = [
        kwargs.get(field) or getattr(defaults, field, None) or 1 for field in ("num_beams", "num_return_sequences")
    ]
    return RowNames(adapter_names, max(counts))
