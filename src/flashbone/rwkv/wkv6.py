"""The time mixing of RWKV-6: a state that is decayed and written to at each token, and a bonus for the token itself.

    y_t = S_{t-1} r_t + v_t (u * k_t . r_t)        S_t = S_{t-1} diag(exp(log_w_t)) + v_t k_t^T

with S (N, N): value by key features. `loop` says that token by token; `chunked` gives the same with matrix products
over chunks of tokens (docs/maths.md, RWKV). Both compute in fp32 at least, and autograd goes through both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone.rwkv.chunks import cut, joined, product

VERSION = 6
FLA = "fla.ops.rwkv6"  # where flash-linear-attention has its kernel
CHUNK, PART = 32, 4  # tokens

Tokens = Float[Tensor, "batch tokens heads N"]
State = Float[Tensor, "batch heads N N"]


def loop(
    r: Tokens, log_w: Tokens, k: Tokens, v: Tokens, u: Float[Tensor, "heads N"], state: State
) -> tuple[Tokens, State]:
    """The outputs y and the state after the last token, one token after the other."""
    r, log_w, k, v, u = (x.to(state.dtype) for x in (r, log_w, k, v, u))
    outputs, S = [], state
    # Not x[:, t], whose gradient is as large as x: T of those would make backward quadratic in T.
    for r_t, w_t, k_t, v_t in zip(*(x.unbind(1) for x in (r, log_w.exp(), k, v)), strict=True):
        bonus = (u * k_t * r_t).sum(-1, keepdim=True)
        outputs.append((S @ r_t.unsqueeze(-1)).squeeze(-1) + bonus * v_t)
        S = S * w_t.unsqueeze(-2) + v_t.unsqueeze(-1) * k_t.unsqueeze(-2)
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(r)), S


def chunked(
    r: Tokens,
    log_w: Tokens,
    k: Tokens,
    v: Tokens,
    u: Float[Tensor, "heads N"],
    state: State,
    chunk: int = CHUNK,
    part: int = PART,
) -> tuple[Tokens, State]:
    """As `loop`, with T / chunk steps one after the other instead of T.

    Decay is not bounded, so that nothing is divided by it, and no sum of its logarithms is taken from another: inside
    parts of a chunk the decay between each pair of tokens is a product of their decays, and tokens of different parts
    meet at the parts' ends, where all factors are at most 1.
    """
    batch, tokens, heads = r.shape[:3]
    if tokens == 0:
        return torch.zeros_like(r, dtype=state.dtype), state
    r, log_w, k, v = (cut(x, chunk, state.dtype).unflatten(-2, (-1, part)) for x in (r, log_w, k, v))
    u = u.to(state.dtype).repeat(batch, 1)[:, None, None, None]
    w, parts = log_w.exp(), log_w.sum(-2)  # (rows, chunks, parts, N)
    own, k_end = _scores(*(x.unsqueeze(-2) for x in (r, k, w)))
    own = own + torch.diag_embed((r * k * u).sum(-1))
    r_start = r * _sums_before(log_w).exp()
    scores, k_end = _scores(r_start, k_end, parts.exp().unsqueeze(-2))
    scores = scores + _block_diagonal(own)
    starts, last = _states(state.flatten(0, 1), parts.sum(-2).exp(), product(v.flatten(2, 3).mT, k_end))
    since_start = (r_start * _sums_before(parts).exp().unsqueeze(-2)).flatten(2, 3)
    y = product(since_start, starts.mT, product(scores, v.flatten(2, 3)))
    return joined(y, heads, tokens), last.unflatten(0, (batch, heads))


def by_fla(
    r: Tokens, log_w: Tokens, k: Tokens, v: Tokens, u: Float[Tensor, "heads N"], state: State
) -> tuple[Tokens, State]:
    """As `loop`, by flash-linear-attention, which keeps the state as key by value features, and wants one dtype but for
    decays and the state."""
    kernel: Any = importlib.import_module(FLA).chunk_rwkv6
    k, v, u = (x.to(r.dtype) for x in (k, v, u))  # under autocast they may be wider than r
    y, last = kernel(r, k, v, log_w, u, scale=1.0, initial_state=state.mT.contiguous(), output_final_state=True)
    return y, last.mT.to(state.dtype)


def sample(random: Callable[..., Tensor], tokens: int, head_size: int) -> list[Tensor]:
    """Inputs of `loop` as a model makes them, for two sequences and heads."""
    shape = (2, tokens, 2, head_size)
    r, k, v, state = random(*shape), random(*shape), random(*shape), random(2, 2, head_size, head_size)
    return [r, -random(*shape).exp(), k, v, random(2, head_size), state]


def _sums_before(x: Float[Tensor, "*rows steps N"]) -> Float[Tensor, "*rows steps N"]:
    """At each step the sum over the steps before it."""
    return torch.nn.functional.pad(x, (0, 0, 1, 0))[..., :-1, :].cumsum(-2)


def _scores(
    r: Float[Tensor, "*rows steps m N"], k: Float[Tensor, "*rows steps m N"], w: Float[Tensor, "*rows steps 1 N"]
) -> tuple[Float[Tensor, "*rows t t"], Float[Tensor, "*rows t N"]]:
    """The products of the r with the k of earlier steps, decayed by the w of the steps between, and 0 for later ones;
    and the k, decayed by the w of all steps after their own."""
    *rows, steps, m, size = r.shape
    keys, scores = k.new_empty(*rows, 0, size), []
    for r_step, k_step, w_step in zip(*(x.unbind(-3) for x in (r, k, w)), strict=True):
        scores.append(torch.nn.functional.pad(r_step @ keys.mT, (0, steps * m - keys.shape[-2])))
        keys = torch.cat([keys * w_step, k_step], -2)
    return torch.cat(scores, -2), keys


def _block_diagonal(x: Float[Tensor, "rows chunks parts part part"]) -> Float[Tensor, "rows chunks c c"]:
    parts = x.shape[2]
    spread = x.unsqueeze(4) * torch.eye(parts, dtype=x.dtype, device=x.device)[:, None, :, None]
    return spread.flatten(4, 5).flatten(2, 3)


def _states(
    S: Float[Tensor, "rows N N"], factors: Float[Tensor, "rows chunks N"], summands: Float[Tensor, "rows chunks N N"]
) -> tuple[Float[Tensor, "rows chunks N N"], Float[Tensor, "rows N N"]]:
    """The state at the start of each chunk, and at the end."""
    starts = []
    for factor, summand in zip(factors.unsqueeze(-2).unbind(1), summands.unbind(1), strict=True):
        starts.append(S)
        S = S * factor + summand
    return torch.stack(starts, 1), S
