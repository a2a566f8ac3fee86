"""What is right on a device, checked in a worker: every variant against the fp64 oracle, Triton against plain torch,
a 4-bit base. A check is a row whose figure is a relative error, and whose shape holds the limit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import ROOT, Setting
from benchmarks.methods import adapted
from benchmarks.models import OneLayer, bare, quantize
from benchmarks.timing import timed_ms

sys.path.insert(0, str(ROOT / "tests"))  # the oracle and the tolerances are those of the tests
from helpers import reference
from helpers.comparison import TOLERANCES, relative_error

VARIANTS = ("bone", "mini", "bat-row", "bat-col", "orthogonal")
DTYPES = (torch.bfloat16, torch.float32)


class Unavailable(Exception):
    """What is checked does not exist here; the message says what is missing."""


@dataclass(frozen=True)
class Found:
    """A figure of a check: the fields of a row that the part itself knows."""

    method: str
    shape: dict[str, Any]
    dtype: str
    metric: str
    value: float


def run(part: str, device: str, quick: bool) -> dict[str, Any]:
    """The figures of a part, and in words what failed on the way: one failure does not hide the others."""
    figures, failures = [], []
    try:
        for name, check in CHECKS[part](device, quick):
            try:
                figures += [vars(figure) for figure in check()]
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    except Unavailable as error:
        return {"unavailable": str(error), "figures": [], "failures": []}
    return {"figures": figures, "failures": failures}


Checks = Iterator[tuple[str, Any]]


def _correctness(device: str, quick: bool) -> Checks:
    """Output and gradients of a layer of each variant, as it is and compiled, with sizes that r divides and others."""
    sizes = ((40, 24, 16),) if quick else ((1024, 768, 64), (200, 136, 48))
    for variant in VARIANTS:
        for dtype in DTYPES[:1] if quick else DTYPES:
            for how in ("eager", "compiled"):
                for size in sizes:
                    name = f"{variant} {size[0]} x {size[1]}, {dtype}, {how}"
                    yield name, lambda v=variant, d=dtype, h=how, s=size: _against_oracle(v, d, h, s, device)


def _against_oracle(
    variant: str, dtype: torch.dtype, how: str, size: tuple[int, int, int], device: str
) -> Iterator[Found]:
    into, out, r = size
    torch.manual_seed(0)
    base = OneLayer(into, out, dtype, device)
    layer = bare(adapted(base, Setting(variant, r), ["linear"])).linear
    block = layer.bone_block["default"]
    x = torch.randn(33, into, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn(33, out, dtype=dtype, device=device)
    call = layer
    if how == "compiled":
        torch._dynamo.reset()
        call = torch.compile(layer, backend="inductor" if device == "cuda" else "aot_eager")
    y = call(x)
    y.backward(gradient)
    exact_x, exact_block = (t.detach().cpu().double().requires_grad_() for t in (x, block))
    # The block meets the base in the base's dtype.
    seen = exact_block.to(dtype).double() if dtype == torch.bfloat16 else exact_block
    wanted = reference.forward(exact_x, layer.base_layer.weight.cpu(), None, [(variant, seen, 1.0)])
    wanted.backward(gradient.cpu().double())
    pairs = {
        "output": (y, wanted),
        "gradient of x": (x.grad, exact_x.grad),
        "gradient of the block": (block.grad, exact_block.grad),
    }
    for what, (got, want) in pairs.items():
        yield _error(variant, {"in": into, "out": out, "how": how, "what": what}, dtype, got, want)


def _error(method: str, shape: dict[str, Any], dtype: torch.dtype, got: Any, want: Any) -> Found:
    name = str(dtype).removeprefix("torch.")
    error = relative_error(got.detach().cpu(), want.detach().cpu())
    return Found(method, {**shape, "limit": TOLERANCES[dtype]}, name, "relative_error", error)


def _triton(device: str, quick: bool) -> Checks:
    """Both kernels beside plain torch: results, gradients, and the time of forward and backward."""
    if device != "cuda":
        raise Unavailable("the kernels need a GPU; `make test-triton` interprets them")
    from flashbone.errors import BackendError

    try:
        from flashbone.ops import triton
    except BackendError as error:
        raise Unavailable(str(error)) from error
    from flashbone.ops.bat_row import shift_input
    from flashbone.ops.bone import bounded_sum

    tokens, width, r = (64, 256, 16) if quick else (8192, 4096, 64)

    def kinds(D: Tensor) -> dict[str, tuple[Any, Any]]:
        return {
            "shard sum": (lambda x: triton.shard_sum(x, r), lambda x: bounded_sum(x, r)),
            "input shift": (lambda x: triton.shift_input(x, x, D, 1.0), lambda x: shift_input(x, D)),
        }

    for dtype in DTYPES:
        for name in kinds(torch.empty(0)):
            yield f"{name}, {dtype}", lambda d=dtype, n=name: _triton_beside_torch(n, kinds, d, (tokens, width, r))


def _triton_beside_torch(name: str, kinds: Any, dtype: torch.dtype, size: tuple[int, int, int]) -> Iterator[Found]:
    tokens, width, r = size
    torch.manual_seed(0)
    D = (torch.randn(width // r, r, r, device="cuda") * 0.05).to(dtype).requires_grad_()
    x = torch.randn(tokens, width, device="cuda", dtype=dtype, requires_grad=True)
    results = []
    for who, call in zip(("triton", "torch"), kinds(D)[name], strict=True):

        def both(call: Any = call) -> list[Tensor]:
            x.grad = D.grad = None
            outputs = call(x)
            outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            return [*outputs, x.grad, *([] if D.grad is None else [D.grad])]  # pyright: ignore[reportReturnType]

        results.append([tensor.detach().clone() for tensor in both()])
        shape = {"tokens": tokens, "in": width, "r": r, "kernel": name}
        name_of_dtype = str(dtype).removeprefix("torch.")
        yield Found(who, shape, name_of_dtype, "time_ms", min(timed_ms(both, "cuda", 10) for _ in range(5)))
    for number, (got, want) in enumerate(zip(*results, strict=True)):
        yield _error("triton", {"kernel": name, "what": f"result {number}"}, dtype, got, want)


def _four_bit(device: str, quick: bool) -> Checks:
    """Variants on a base in bitsandbytes' nf4, beside the oracle on the weight that it stands for."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"bitsandbytes is not installed ({error})") from error
    for variant in VARIANTS:
        yield variant, lambda v=variant: _on_four_bit(v, (64, 64, 16) if quick else (1024, 1024, 64), device)


def _on_four_bit(variant: str, size: tuple[int, int, int], device: str) -> Iterator[Found]:
    import bitsandbytes as bnb

    into, out, r = size
    torch.manual_seed(0)
    holder = torch.nn.ModuleDict(
        {"q_proj": torch.nn.Linear(into, out, bias=False, dtype=torch.bfloat16, device=device)}
    )
    quantize(holder.requires_grad_(False))
    layer = bare(adapted(holder, Setting(variant, r), ["q_proj"]))["q_proj"]
    x = torch.randn(33, into, dtype=torch.bfloat16, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    stored = layer.base_layer.weight
    W = bnb.functional.dequantize_4bit(stored.data, stored.quant_state).to(torch.bfloat16)
    block = layer.bone_block["default"].detach().cpu().to(torch.bfloat16)
    wanted = reference.forward(x.detach().cpu(), W.cpu(), None, [(variant, block, 1.0)])
    yield _error(variant, {"in": into, "out": out, "how": "nf4", "what": "output"}, torch.bfloat16, y, wanted)


CHECKS = {"correctness": _correctness, "triton": _triton, "4-bit base": _four_bit}
