"""The time mixing of RWKV-7: a state that is decayed, corrected along one direction and written to at each token.

    S_t = S_{t-1} (diag(exp(log_w_t)) + a_t b_t^T) + v_t k_t^T        y_t = S_t r_t

with S (N, N): value by key features. `loop` says that token by token; `chunked` gives the same with matrix products
over chunks of tokens (docs/maths.md, RWKV). Both compute in fp32 at least, and autograd goes through both.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone.rwkv.chunks import cut, joined, product

VERSION = 7
FLA = "fla.ops.rwkv7"  # where flash-linear-attention has its kernel
CHUNK = 32  # tokens; 1 / decay over a chunk stays far inside fp32, since log_w > -0.6066

Tokens = Float[Tensor, "batch tokens heads N"]
State = Float[Tensor, "batch heads N N"]


def loop(r: Tokens, log_w: Tokens, k: Tokens, v: Tokens, a: Tokens, b: Tokens, state: State) -> tuple[Tokens, State]:
    """The outputs y and the state after the last token, one token after the other."""
    r, log_w, k, v, a, b = (x.to(state.dtype) for x in (r, log_w, k, v, a, b))
    outputs, S = [], state
    # Not x[:, t], whose gradient is as large as x: T of those would make backward quadratic in T.
    for r_t, w_t, k_t, v_t, a_t, b_t in zip(*(x.unbind(1) for x in (r, log_w.exp(), k, v, a, b)), strict=True):
        u = S @ a_t.unsqueeze(-1)
        S = S * w_t.unsqueeze(-2) + u * b_t.unsqueeze(-2) + v_t.unsqueeze(-1) * k_t.unsqueeze(-2)
        outputs.append((S @ r_t.unsqueeze(-1)).squeeze(-1))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(r)), S


def chunked(
    r: Tokens, log_w: Tokens, k: Tokens, v: Tokens, a: Tokens, b: Tokens, state: State, chunk: int = CHUNK
) -> tuple[Tokens, State]:
    """As `loop`, with T / chunk steps one after the other instead of T.

    Inside a chunk, with P_t the product of decays up to t, U the rows u_t = S_{t-1} a_t, and everything that enters at
    i multiplied by 1 / P_i and everything that is read at t by P_t:

        (I - tril(A B^T, -1)) U = A S_0^T + tril(A K^T, -1) V
        Y = R S_0^T + tril(R B^T) U + tril(R K^T) V
        S_end = (S_0 + U^T B + V^T K) diag(P_end) = S_0 G + F
    """
    batch, tokens, heads = r.shape[:3]
    if tokens == 0:
        return torch.zeros_like(r, dtype=state.dtype), state
    r, log_w, k, v, a, b = (cut(x, chunk, state.dtype) for x in (r, log_w, k, v, a, b))
    reached = log_w.cumsum(-2)  # log P
    grown, end = torch.exp(-reached), reached[..., -1:, :].exp()
    r, a, b, k = r * reached.exp(), a * torch.exp(reached - log_w), b * grown, k * grown
    right = torch.cat([a, product(product(a, k.mT).tril(-1), v)], -1)
    # Of the left side the solve reads what is under the diagonal.
    left = torch.eye(chunk, dtype=a.dtype, device=a.device) - product(a, b.mT)
    solved = torch.linalg.solve_triangular(left, right, upper=False, unitriangular=True)
    from_state, own = solved.chunk(2, -1)  # U = from_state S_0^T + own
    b_end, k_end = b * end, k * end
    G = product(from_state.mT, b_end, torch.diag_embed(end.squeeze(-2)))
    F = product(own.mT, b_end, product(v.mT, k_end))
    starts, last = _states(state.flatten(0, 1), G, F)
    U = product(from_state, starts.mT, own)
    y = product(r, starts.mT, product(product(r, k.mT).tril(), v))
    y = product(product(r, b.mT).tril(), U, y)
    return joined(y, heads, tokens), last.unflatten(0, (batch, heads))


def by_fla(r: Tokens, log_w: Tokens, k: Tokens, v: Tokens, a: Tokens, b: Tokens, state: State) -> tuple[Tokens, State]:
    """As `loop`, by flash-linear-attention, which keeps the state as key by value features, and wants one dtype but for
    decays and the state."""
    kernel: Any = importlib.import_module(FLA).chunk_rwkv7
    k, v, a, b = (x.to(r.dtype) for x in (k, v, a, b))  # under autocast they may be wider than r
    with warnings.catch_warnings():
        # Of fp32 "on some platforms": on this one its results have been compared.
        warnings.filterwarnings("ignore", ".*does not support float32", RuntimeWarning)
        y, last = kernel(r, log_w, k, v, a, b, scale=1.0, initial_state=state.mT.contiguous(), output_final_state=True)
    return y, last.mT.to(state.dtype)


def sample(random: Callable[..., Tensor], tokens: int, head_size: int) -> list[Tensor]:
    """Inputs of `loop` as a model makes them, for two sequences and heads."""
    shape = (2, tokens, 2, head_size)
    r, k, v, state = random(*shape), random(*shape), random(*shape), random(2, 2, head_size, head_size)
    direction = torch.nn.functional.normalize(random(*shape), dim=-1)
    return [r, -0.6 * random(*shape).sigmoid(), k, v, -direction, direction * random(*shape).sigmoid(), state]


def _states(
    S: Float[Tensor, "rows N N"], factors: Float[Tensor, "rows chunks N N"], summands: Float[Tensor, "rows chunks N N"]
) -> tuple[Float[Tensor, "rows chunks N N"], Float[Tensor, "rows N N"]]:
    """The state at the start of each chunk, and at the end: one product for each chunk."""
    starts = []
    for factor, summand in zip(factors.unbind(1), summands.unbind(1), strict=True):
        starts.append(S)
        S = torch.baddbmm(summand, S, factor)
    return torch.stack(starts, 1), S
