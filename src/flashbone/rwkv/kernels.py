"""The backend of the time mixing: plain torch, or flash-linear-attention's kernels where they are installed and agree.

flash-linear-attention (`pip install flash-linear-attention`) needs a GPU and Triton. Before it is used, its kernel is
run once for each device, dtype and head size, forward and backward, and compared with ours: "auto" takes it only if
they agree, and "fla", which asks for it by name, raises if they do not.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from flashbone.errors import BackendError

log = logging.getLogger(__name__)

# RMS error over RMS of ours, whose inputs are rounded to the same dtype; the kernels multiply in bf16 or TF32.
TOLERANCES = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_TOKENS = 96  # of the comparison: more than one chunk of either


def run(wkv: Any, backend: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs, in the state's dtype or r's, and the new state of `wkv`, a module such as `wkv7`, by the
    backend that `chooses_fla` picks; inputs are those of its `loop`, r first."""
    if inputs[0].shape[1] <= 1:
        return wkv.loop(*inputs)
    return (wkv.by_fla if chooses_fla(wkv, backend, inputs[0]) else wkv.chunked)(*inputs)


def chooses_fla(wkv: Any, backend: str, like: Tensor) -> bool:
    """Whether fla's kernel is to be used for tensors like this one.

    Raises:
        BackendError: "fla" was asked for, and it is not there or gives other results.
    """
    if backend == "torch" or (backend == "auto" and like.device.type != "cuda"):
        return False
    problem = why_not(wkv, like.device, like.dtype, like.shape[-1])
    if problem and backend == "fla":
        raise BackendError(f"wkv_backend 'fla': {problem}; use 'auto' or 'torch'")
    return problem is None


@functools.cache
def why_not(wkv: Any, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why fla's kernel cannot be used for a version on a device; None if it gave our results there."""
    if dtype not in TOLERANCES:
        return f"it computes no {str(dtype).removeprefix('torch.')}"
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whoever asks first
            error = _disagreement(wkv, _sample(wkv, device, dtype, head_size))
        if error <= TOLERANCES[dtype]:  # NaN is not
            return None
        problem = f"its results differ from ours by {error:.2g} (relative RMS) on {device}"
    except Exception as reason:  # a kernel that does not compile or run there, for whatever reason
        if isinstance(reason, ModuleNotFoundError) and reason.name == "fla":
            return "flash-linear-attention is not installed"
        problem = f"its kernel fails on {device} ({type(reason).__name__}: {' '.join(str(reason).split())[:200]})"
    log.warning("flash-linear-attention's kernel of RWKV-%d is not used: %s", wkv.VERSION, problem)
    return problem


def _sample(wkv: Any, device: torch.device, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Random inputs as a model makes them."""
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float32, device="cpu")

    inputs = wkv.sample(random, _TOKENS, head_size)
    kept = {1, len(inputs) - 1}  # decays and the state are fp32 in the models
    return [x.to(device, torch.float32 if place in kept else dtype) for place, x in enumerate(inputs)]


def _disagreement(wkv: Any, inputs: list[Tensor]) -> float:
    """The largest relative RMS error of outputs, states and gradients; NaN if one is."""
    results = []
    for compute in (wkv.chunked, wkv.by_fla):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, state = compute(*leaves)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float32, device=y.device).view_as(y)
        grads = torch.autograd.grad((y.float() * weights).sum() + state.float().square().sum(), leaves)
        results.append([x.detach().double() for x in (y, state, *grads)])
    return float(torch.stack([(got - want).norm() / want.norm() for want, got in zip(*results, strict=True)]).max())
