"""What a call of a model builds from its parameters and uses again in later steps: sums of blocks, shifted weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class Kept:
    """Tensors by role and settings, for as long as one call of a model runs, in which its parameters do not change.

    torch does not signal every write (fused optimisers and `.data` raise no version), so nothing outlives a call.

    Attributes:
        keeps_weights: whether tensors as large as a weight are to be kept.
        plan: what the layer's next calls run, see `tuner.layers.plan`.
    """

    __slots__ = ("_asked", "keeps_weights", "plan", "values")

    def __init__(self, keeps_weights: bool = True) -> None:
        self.keeps_weights = keeps_weights
        self.values: dict[Hashable, Tensor] = {}
        self.plan: Any = None
        self._asked: set[Hashable] = set()

    def get(self, key: Hashable, build: Callable[[], Tensor]) -> Tensor:
        """The tensor that the first call with this key built."""
        value = self.values.get(key)
        if value is None:
            value = self.values[key] = build()
        return value

    def is_worth_keeping(self, key: Hashable) -> bool:
        """Whether to keep a tensor that costs as much as many calls: yes if it is kept or wanted a second time."""
        if key in self.values or key in self._asked:
            return True
        self._asked.add(key)
        return False


class _Nothing(Kept):
    """Inference outside of a model's call."""

    __slots__ = ()

    def get(self, key: Hashable, build: Callable[[], Tensor]) -> Tensor:
        return build()


NOTHING = _Nothing(keeps_weights=False)
