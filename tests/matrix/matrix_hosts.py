"""The kinds of base layers of the matrix: how each is built and called, and what the family refuses on it, and why."""

from __future__ import annotations

import copy
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
EVERYWHERE: dict[tuple[str, str], Refusal | None] = {
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
        refuses: by operation and variant, or "*" for all; the most special one decides, None is an exception.
        package: what has to be installed for it.
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
    refuses: dict[tuple[str, str], Refusal | None] = field(default_factory=dict)

    package: str = ""
    requantised: float = 0.0

    def refusal(self, operation: str, variant: str) -> Refusal | None:
        """Why this cannot be; None if it can."""
        keys = [(operation, variant), (operation, "*"), ("*", variant), ("*", "*")]
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

SHIFTED_AT_ONCE = Refusal(
    "shifts one weight for all rows of a batch", "the weight is read once for all rows; run one batch for each adapter"
)
NOT_CALLED = Refusal("cannot be applied", "the layer is never called, so that there is no input to drop")


def _conv(build: Callable[[], nn.Module], x: tuple[int, ...], name: str, what: str) -> Host:
    return Host(
        name,
        what,
        lambda dtype: build().to(dtype),
        lambda dtype: torch.randn(x, dtype=dtype),
        lambda layer: layer.weight.double().flatten(1),
        lambda layer, W, x: (
            copy.deepcopy(layer).double()._conv_forward(x.double(), W.view(layer.weight.shape), layer.bias.double())
        ),
    )


CONV2D_1X1 = _conv(
    lambda: nn.Conv2d(IN, OUT, 1, stride=2), (ROWS, IN, 5, 4), "Conv2d-1x1", "torch.nn.Conv2d with a kernel of 1 x 1"
)
CONV2D = _conv(
    lambda: nn.Conv2d(6, OUT, 3, padding=1), (ROWS, 6, 5, 4), "Conv2d-3x3", "torch.nn.Conv2d with a kernel of 3 x 3"
)
CONV = _conv(lambda: nn.Conv1d(6, OUT, 3), (ROWS, 6, 7), "Conv1d", "torch.nn.Conv1d with a kernel of 3")

NO_DENSE_INPUT = Refusal(
    "multiplies the weight of Embedding",
    "the variant multiplies all rows of the table in every call; bone and mini look rows up",
)
EMBEDDING = Host(
    "Embedding",
    "torch.nn.Embedding, a linear layer on one-hot rows",
    lambda dtype: nn.Embedding(IN, OUT, dtype=dtype),
    lambda dtype: torch.randint(IN, (ROWS, 3)),
    lambda layer: layer.weight.double().mT,
    lambda layer, W, x: nn.functional.embedding(x, W.mT),
    refuses={("wrong-size", "*"): None, ("weighted", "orthogonal"): NO_DENSE_INPUT}
    | {("*", variant): NO_DENSE_INPUT for variant in ("bat-col", "bat-row", "orthogonal")},
)


def _attention_output(layer: Any, W: Tensor, x: Tensor) -> Tensor:
    layer, x = copy.deepcopy(layer).double(), x.double()
    in_proj, bias = layer.in_proj_weight, layer.in_proj_bias
    q, k, v = nn.functional.linear(x, in_proj, bias).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    heads = nn.functional.scaled_dot_product_attention(q, k, v)
    return nn.functional.linear(heads.transpose(1, 2).flatten(-2), W, layer.out_proj.bias)


OUT_PROJ = Host(
    "MultiheadAttention",
    "out_proj of torch.nn.MultiheadAttention, whose weight is read and which is never called",
    lambda dtype: nn.MultiheadAttention(12, 2, batch_first=True, dtype=dtype),
    lambda dtype: torch.randn(ROWS, 3, 12, dtype=dtype),
    lambda layer: layer.out_proj.weight.double(),
    _attention_output,
    target={"target_modules": ["layer.out_proj"]},
    refuses={("rows", "*"): SHIFTED_AT_ONCE, ("dropout", "*"): NOT_CALLED},
)


class Experts(nn.Module):
    """Three experts in one parameter, (experts, out, in), as mixtures keep them; every expert sees every token."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(3, OUT, IN, dtype=dtype) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i, eoi -> ...eo", x, self.fused)


EXPERTS = Host(
    "experts",
    "the fused experts of a mixture, one parameter (experts, out, in), by target_parameters",
    Experts,
    _features,
    lambda layer: layer.fused.double(),
    lambda layer, W, x: torch.einsum("...i, eoi -> ...eo", x.double(), W),
    target={"target_modules": [], "target_parameters": ["layer.fused"]},
    refuses={("rows", "*"): SHIFTED_AT_ONCE, ("dropout", "*"): NOT_CALLED},
)

# Sizes that every quantisation takes.
QUANTISED_OUT, QUANTISED_IN = 96, 64
PACKAGES = {"bnb": "bitsandbytes", "torchao": "torchao", "hqq": "hqq"}


def _quantised(name: str, backend: str, what: str, **fields: Any) -> Host:
    """A layer of tests/helpers/quantised.py; its W is what its calls show."""

    def build(dtype: torch.dtype) -> nn.Module:
        from helpers.quantised import quantised_linear

        made = quantised_linear(backend, QUANTISED_OUT, QUANTISED_IN)
        layer: Any = made.layer
        if backend.startswith("bnb nf4"):  # else bitsandbytes calls it in bf16 on some CPUs, until it has an adapter
            layer.support_avx512bf16_for_cpu = False
        layer.requantised_with = made.settings.get("get_apply_tensor_subclass")
        return layer

    def matrix(layer: Any) -> Tensor:
        from helpers.quantised import dequantised

        return dequantised(layer, QUANTISED_IN).double()

    package = next(package for prefix, package in PACKAGES.items() if backend.startswith(prefix))
    return Host(
        name,
        what,
        build,
        lambda dtype: torch.randn(ROWS, 3, QUANTISED_IN, dtype=dtype),
        matrix,
        _linear_output,
        dtypes=(torch.float32,),
        package=package,
        **fields,
    )


NF4_PICKLES = Refusal("no attribute 'SCB'", "bitsandbytes' 4-bit weights lose their class when they are pickled")
TORCHAO_PICKLES = Refusal("has no attribute '__name__'", "torchao's layers cannot be pickled, with adapters or without")
HQQ_COPIES = Refusal("the deepcopy protocol", "HQQ's layers cannot be copied, with adapters or without")
HQQ_DTYPES = Refusal("the same dtype", "HQQ's layers keep the dtype that they were made for, with adapters or without")
HQQ_AUTOCAST = Refusal("the same dtype", "HQQ's layers give no gradient of their input under autocast")
QUANTISED = (
    _quantised(
        "bnb-nf4",
        "bnb nf4",
        "bitsandbytes' 4-bit linear layer (nf4)",
        requantised=0.12,
        refuses={("pickle", "bat-col"): NF4_PICKLES},
    ),
    _quantised("bnb-int8", "bnb int8", "bitsandbytes' 8-bit linear layer", requantised=0.02),
    _quantised(
        "torchao-int8",
        "torchao int8",
        "torchao's weight-only int8",
        requantised=0.02,
        refuses={("pickle", "*"): TORCHAO_PICKLES},
    ),
    _quantised(
        "hqq-4",
        "hqq 4",
        "HQQ's 4-bit linear layer",
        requantised=0.12,
        refuses={
            ("deepcopy", "*"): HQQ_COPIES,
            ("cast", "*"): HQQ_DTYPES,
            ("autocast", "bat-row"): HQQ_AUTOCAST,
            ("autocast", "orthogonal"): HQQ_AUTOCAST,
        },
    ),
)

HOSTS = (LINEAR, CONV1D, CONV2D_1X1, CONV2D, CONV, EMBEDDING, OUT_PROJ, EXPERTS, *QUANTISED)
