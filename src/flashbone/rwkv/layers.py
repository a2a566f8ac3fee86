"""Layers that both versions share: norms that keep their precision, and random starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class RwkvHalf(nn.Module):
    """Half of a block. It uses `read` on its parameters: an adapter may have put a module in the place of one."""


class TimeMix(RwkvHalf):
    """The half of a block that mixes what tokens say over time, by a state of each head.

    Attributes:
        config: of the model.
        time_state: (heads, value, key), what a sequence starts from in the place of zeros; only where it was learned.
    """

    config: Any

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Of `time_state`."""
        return self.config.num_heads, self.config.head_size, self.config.head_size

    def add_time_state(self) -> None:
        """Make the state a parameter, of zeros, which is not trained yet."""
        zeros = torch.zeros(self.state_shape, device=next(self.parameters()).device)
        self.time_state = nn.Parameter(zeros, requires_grad=False)
        self.config.has_time_state = True

    def start(self, state: Tensor) -> Tensor:
        """The state (batch, heads, value, key) of a new sequence, in the place of one of zeros."""
        return read(self.time_state).to(state).expand_as(state) if hasattr(self, "time_state") else state


def read(parameter: Tensor | nn.Module) -> Tensor:
    """A parameter's value now; a module in its place returns it."""
    return parameter if isinstance(parameter, Tensor) else parameter()


class Norm(nn.LayerNorm):
    """A LayerNorm whose weights may be in another dtype than its input, as trained ones are."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype:
            return super().forward(input)
        wide = torch.promote_types(input.dtype, self.weight.dtype)
        out = functional.layer_norm(
            input.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps
        )
        return out.to(input.dtype)


class HeadNorm(nn.GroupNorm):
    """ln_x: each head of (batch, tokens, hidden) by itself, in fp32 at least."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        flat = input.flatten(0, 1).to(wide)
        out = functional.group_norm(flat, self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)
        return out.view(input.shape)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """All of RWKV's projections are without bias."""
    return nn.Linear(inputs, outputs, bias=False)


def vector(size: int) -> nn.Parameter:
    """(1, 1, size), as in BlinkDL's files."""
    return nn.Parameter(torch.empty(1, 1, size))


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


@torch.no_grad()
def ramp_(parameter: Tensor, first: float, last: float) -> None:
    """Fill with numbers from the first to the last in order, by a function that transformers knows to skip."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(torch.linspace(first, last, parameter.numel()).view_as(parameter))
