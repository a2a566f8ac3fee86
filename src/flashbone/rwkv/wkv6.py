"""The time mixing of RWKV-6: a state that is decayed and written to at each token, and a bonus for the token itself.

    y_t = S_{t-1} r_t + v_t (u * k_t . r_t)        S_t = S_{t-1} diag(exp(log_w_t)) + v_t k_t^T

with S (N, N): value by key features. `loop` says that token by token; `chunked` gives the same with matrix products
over chunks of tokens (docs/maths.md, RWKV). Both compute in fp32 at least, and autograd goes through both.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone.rwkv.chunks import cut, joined, product

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
    r_start, k_end = (
        r * _sums_before(log_w).exp(),
        k * _sums_after(log_w).exp(),
    )  # decayed since, and until, a part's end
    parts = log_w.sum(-2)  # (rows, chunks, parts, N)
    to_end = k_end * _sums_after(parts).exp().unsqueeze(-2)
    F = product(v.flatten(2, 3).mT, to_end.flatten(2, 3))
    starts, last = _states(state.flatten(0, 1), parts.sum(-2).exp(), F)
    own = _scores(*(x.unsqueeze(-2) for x in (r, k, log_w.exp()))) + torch.diag_embed((r * k * u).sum(-1))
    scores = _scores(r_start, k_end, parts.exp().unsqueeze(-2)) + _block_diagonal(own)
    since_start = (r_start * _sums_before(parts).exp().unsqueeze(-2)).flatten(2, 3)
    y = product(since_start, starts.mT, product(scores, v.flatten(2, 3)))
    return joined(y, heads, tokens), last.unflatten(0, (batch, heads))


def _sums_before(x: Float[Tensor, "*rows steps N"]) -> Float[Tensor, "*rows steps N"]:
    """At each step the sum over the steps before it."""
    return torch.nn.functional.pad(x, (0, 0, 1, 0))[..., :-1, :].cumsum(-2)


def _sums_after(x: Float[Tensor, "*rows steps N"]) -> Float[Tensor, "*rows steps N"]:
    """At each step the sum over the steps after it."""
    return _sums_before(x.flip(-2)).flip(-2)


def _scores(
    r: Float[Tensor, "*rows steps m N"], k: Float[Tensor, "*rows steps m N"], w: Float[Tensor, "*rows steps 1 N"]
) -> Float[Tensor, "*rows t t"]:
    """The products of the r with the k of earlier steps, decayed by the w of the steps between; 0 for later ones."""
    steps, m = r.shape[-3:-1]
    rows, keys = [r.new_zeros(*r.shape[:-3], m, steps * m)], k[..., 0, :, :]
    for step in range(1, steps):
        rows.append(torch.nn.functional.pad(r[..., step, :, :] @ keys.mT, (0, (steps - step) * m)))
        keys = torch.cat([keys * w[..., step, :, :], k[..., step, :, :]], -2)
    return torch.cat(rows, -2)


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
