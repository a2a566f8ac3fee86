"""RwkvState: what an RWKV model remembers of a sequence, in the place of other models' key-value cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashbone.errors import ConfigError, ShapeError


class LayerState(NamedTuple):
    """The memory of one block.

    Attributes:
        att: (batch, hidden), what the time mixing saw last.
        wkv: (batch, heads, N, N), value by key features, in fp32 (fp64 in a model of fp64).
        ffn: (batch, hidden), what the channel mixing saw last.
    """

    att: Tensor
    wkv: Tensor
    ffn: Tensor

    def to_each(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        return LayerState(*map(function, self))


@dataclass
class RwkvState:
    """The recurrent state after some tokens: `past_key_values` of a call, which a call with a cache replaces in place.

    It has one size however long the sequence is. `copy.deepcopy` keeps a prefix for several continuations.

    Attributes:
        layers: the memory of each block.
        tokens_seen: columns that went in, padding included.
    """

    layers: list[LayerState] = field(default_factory=list)
    tokens_seen: int = 0

    # What transformers asks of caches.
    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # so that `generate` leaves out the tokens that the state has seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that went in so far."""
        return self.tokens_seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows into the order of `beam_idx`."""
        self._to_each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._to_each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self._to_each(lambda tensor: tensor[indices])

    def detach(self) -> RwkvState:
        """The same state, without the graph that made it."""
        return RwkvState([layer.to_each(torch.Tensor.detach) for layer in self.layers], self.tokens_seen)

    def _to_each(self, function: Callable[[Tensor], Tensor]) -> None:
        self.layers = [layer.to_each(function) for layer in self.layers]


def given_layers(state: Any, x: Tensor) -> list[LayerState]:
    """The memory in the `past_key_values` of a call with x (batch, tokens, hidden); empty where there is none yet.

    Raises:
        ConfigError: it is the cache of other models, or in another dtype.
        ShapeError: it is of another batch.
    """
    if state is None:
        return []
    if not isinstance(state, RwkvState):
        raise ConfigError(f"past_key_values: got a {type(state).__name__}, wanted the RwkvState that a call returned")
    if not state.layers:
        return []
    token = state.layers[0].att
    if token.shape[0] != x.shape[0]:
        raise ShapeError(
            f"past_key_values: got the state of {token.shape[0]} rows, wanted {x.shape[0]}; batch_repeat_interleave it"
        )
    if token.dtype != x.dtype:
        raise ConfigError(f"past_key_values: got a state in {token.dtype}, of a model that computes in {x.dtype}")
    return state.layers
