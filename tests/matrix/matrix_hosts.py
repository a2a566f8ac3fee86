"""The kinds of base layers of the matrix: how each is built and called, and what the family refuses on it, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

OUT, IN, ROWS = 12, 18, 4  # r = 4 divides one of them
HALVES_TOO = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Refusal:
    """What is not supported: the words of the error that says so, and the reason as docs/support.md gives it."""

    match: str
    why: str


# On every kind of layer.
EVERYWHERE = {
    ("weighted", "orthogonal"): Refusal(
        "no single adapter is their sum", "a sum of two rotations is no rotation; activate both with scales"
    ),
}


@dataclass(frozen=True)
class Host:
    """One kind of base layer.

    Attributes:
        name: as in the tests' names and in docs/support.md.
        what: one line about it.
        build: the bare layer, in a dtype.
        inputs: what it is called with.
        matrix: W (out, in) of the bare layer, in fp64.
        output: what the bare layer would give with another W, in fp64.
        dtypes: those that are tried.
        target: the config's fields that choose the layer.
        refuses: by operation and variant, or "*" for all.
        requantised: the largest relative error of an output after a merge that quantises the weight anew.
    """

    name: str
    what: str
    build: Callable[[torch.dtype], nn.Module]
    inputs: Callable[[torch.dtype], Tensor]
    matrix: Callable[[Any], Tensor]
    output: Callable[[Any, Tensor, Tensor], Tensor]
    dtypes: tuple[torch.dtype, ...] = HALVES_TOO
    target: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["layer"]})
    refuses: dict[tuple[str, str], Refusal] = field(default_factory=dict)

    requantised: float = 0.0

    def refusal(self, operation: str, variant: str) -> Refusal | None:
        """Why this cannot be; None if it can."""
        keys = [("*", "*"), ("*", variant), (operation, "*"), (operation, variant)]
        refuses = EVERYWHERE | self.refuses
        return next((refuses[key] for key in keys if key in refuses), None)


def _features(dtype: torch.dtype) -> Tensor:
    return torch.randn(ROWS, 3, IN, dtype=dtype)


def _linear_output(layer: Any, W: Tensor, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(x.double(), W, bias)


LINEAR = Host(
    "Linear",
    "torch.nn.Linear",
    lambda dtype: nn.Linear(IN, OUT, dtype=dtype),
    _features,
    lambda layer: layer.weight.double(),
    _linear_output,
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
)

CONV1D = Host(
    "Conv1D",
    "transformers' Conv1D, the linear layer of GPT-2, whose weight is transposed",
    lambda dtype: Conv1D(OUT, IN).to(dtype),
    _features,
    lambda layer: layer.weight.double().mT,
    _linear_output,
)

HOSTS = (LINEAR, CONV1D)
