"""Who runs the time mixing: plain torch, or flash-linear-attention's kernels where they are there and agree with it.

flash-linear-attention (`pip install flash-linear-attention`) needs a GPU and Triton. Before it is used, its kernel is
run once for each device, dtype and head size, forward and backward, and compared with ours: "auto" takes it only if
they agree, and "fla", which asks for it by name, raises if they do not.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from flashbone.errors import BackendError
from flashbone.rwkv import wkv6, wkv7

log = logging.getLogger(__name__)

# RMS error over RMS of ours, whose inputs are rounded to the same dtype; the kernels multiply in bf16 or TF32.
TOLERANCES = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_PACKAGE = {7: "fla.ops.rwkv7", 6: "fla.ops.rwkv6"}
_TOKENS = 96  # of the comparison: more than one chunk of either


def run_wkv7(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """The outputs, in the state's dtype or r's, and the new state of `wkv7`, by whichever backend it should be."""
    if r.shape[1] <= 1:
        return wkv7.loop(r, log_w, k, v, a, b, state)
    run = _fla_wkv7 if chooses_fla(7, backend, r) else wkv7.chunked
    return run(r, log_w, k, v, a, b, state)


def run_wkv6(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """As `run_wkv7`, of `wkv6`."""
    if r.shape[1] <= 1:
        return wkv6.loop(r, log_w, k, v, u, state)
    run = _fla_wkv6 if chooses_fla(6, backend, r) else wkv6.chunked
    return run(r, log_w, k, v, u, state)


def chooses_fla(version: int, backend: str, like: Tensor) -> bool:
    """Whether fla's kernel is to be used for tensors like this one.

    Raises:
        BackendError: "fla" was asked for, and it is not there or gives other results.
    """
    if backend == "torch" or (backend == "auto" and like.device.type != "cuda"):
        return False
    problem = why_not(version, like.device, like.dtype, like.shape[-1])
    if problem and backend == "fla":
        raise BackendError(f"wkv_backend 'fla': {problem}; use 'auto' or 'torch'")
    return problem is None


@functools.cache
def why_not(version: int, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why fla's kernel cannot be used for a version on a device; None if it gave our results there."""
    if dtype not in TOLERANCES:
        return f"it computes no {str(dtype).removeprefix('torch.')}"
    try:
        importlib.import_module(_PACKAGE[version])
        with torch.inference_mode(False), torch.enable_grad():  # whoever asks first
            error = _disagreement(version, _sample(version, device, dtype, head_size))
        if error <= TOLERANCES[dtype]:  # NaN is not
            return None
        problem = f"its results differ from ours by {error:.2g} (relative RMS) on {device}"
    except Exception as reason:  # a kernel that does not compile or run there, for whatever reason
        if isinstance(reason, ModuleNotFoundError) and reason.name == "fla":
            return "flash-linear-attention is not installed"
        problem = f"its kernel fails on {device} ({type(reason).__name__}: {' '.join(str(reason).split())[:200]})"
    log.warning("flash-linear-attention's kernel of RWKV-%d is not used: %s", version, problem)
    return problem


def _sample(version: int, device: torch.device, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Random inputs as a model makes them."""
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float32, device="cpu")

    tokens = (2, _TOKENS, 2, head_size)
    r, k, v = random(*tokens), random(*tokens), random(*tokens)
    state = random(2, 2, head_size, head_size)
    if version == 7:
        direction = torch.nn.functional.normalize(random(*tokens), dim=-1)
        given = [r, -0.6 * random(*tokens).sigmoid(), k, v, -direction, direction * random(*tokens).sigmoid(), state]
    else:
        given = [r, -random(*tokens).exp(), k, v, random(2, head_size), state]
    kept = {1, len(given) - 1}  # decays and the state are fp32 in the models
    return [x.to(device, torch.float32 if place in kept else dtype) for place, x in enumerate(given)]


def _disagreement(version: int, inputs: list[Tensor]) -> float:
    """The largest relative RMS error of outputs, states and gradients; NaN if one is."""
    results = []
    for run in {7: (wkv7.chunked, _fla_wkv7), 6: (wkv6.chunked, _fla_wkv6)}[version]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, state = run(*leaves)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float32, device=y.device).view_as(y)
        grads = torch.autograd.grad((y.float() * weights).sum() + state.float().square().sum(), leaves)
        results.append([x.detach().double() for x in (y, state, *grads)])
    return float(torch.stack([(got - want).norm() / want.norm() for want, got in zip(*results, strict=True)]).max())


def _fla_wkv7(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """fla keeps the state as key by value features, and wants one dtype but for decays and the state."""
    kernel: Any = importlib.import_module(_PACKAGE[7]).chunk_rwkv7
    k, v, a, b = (x.to(r.dtype) for x in (k, v, a, b))  # under autocast they may be wider than r
    with warnings.catch_warnings():
        # Of fp32 "on some platforms": on this one its results have been compared.
        warnings.filterwarnings("ignore", ".*does not support float32", RuntimeWarning)
        y, last = kernel(r, log_w, k, v, a, b, scale=1.0, initial_state=state.mT.contiguous(), output_final_state=True)
    return y, last.mT.to(state.dtype)


def _fla_wkv6(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `_fla_wkv7`."""
    kernel: Any = importlib.import_module(_PACKAGE[6]).chunk_rwkv6
    k, v, u = (x.to(r.dtype) for x in (k, v, u))
    y, last = kernel(r, k, v, log_w, u, scale=1.0, initial_state=state.mT.contiguous(), output_final_state=True)
    return y, last.mT.to(state.dtype)
