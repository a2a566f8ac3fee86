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

CHUNK, PART = 32, 8  # tokens
GONE = 30.0  # exp(-30) leaves nothing that fp32 can add, and sums with larger ones would lose the small ones beside

Tokens = Float[Tensor, "batch tokens heads N"]
State = Float[Tensor, "batch heads N N"]


def loop(
    r: Tokens, log_w: Tokens, k: Tokens, v: Tokens, u: Float[Tensor, "heads N"], state: State
) -> tuple[Tokens, State]:
    """The outputs y and the state after the last token, one token after the other."""
    r, log_w, k, v, u = (x.to(state.dtype) for x in (r, log_w, k, v, u))
    outputs, S, w = [], state, log_w.exp()
    for t in range(r.shape[1]):
        bonus = (u * k[:, t] * r[:, t]).sum(-1, keepdim=True)
        outputs.append((S @ r[:, t].unsqueeze(-1)).squeeze(-1) + bonus * v[:, t])
        S = S * w[:, t].unsqueeze(-2) + v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
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

    Decay is not bounded, so that nothing is ever divided by it: a factor exp(log P_{t-1} - log P_i) is computed for
    each pair of tokens inside parts of a chunk, and between parts by way of the start of the later part, where both
    halves are at most 1.
    """
    batch, tokens, heads = r.shape[:3]
    if tokens == 0:
        return torch.zeros_like(r, dtype=state.dtype), state
    r, log_w, k, v = (cut(x, chunk, state.dtype) for x in (r, log_w.clamp(min=-GONE), k, v))
    reached = log_w.unflatten(-2, (-1, part)).cumsum(-2)  # log P_t since the start of its part
    before = reached - log_w.unflatten(-2, (-1, part))  # log P_{t-1}
    whole = reached[..., -1, :].cumsum(-2)  # (rows, chunks, parts, N): log P at the end of each part
    since_start = whole - reached[..., -1, :]
    r_read = r.unflatten(-2, (-1, part)) * before.exp()
    k_written = k.unflatten(-2, (-1, part)) * torch.exp(reached[..., -1:, :] - reached)
    end = whole[..., -1, :]
    k_end = k_written * torch.exp(end.unsqueeze(-2) - whole).unsqueeze(-2)
    starts, last = _states(state.flatten(0, 1), end.exp(), product(v.mT, k_end.flatten(2, 3)))
    r_state = (r_read * since_start.exp().unsqueeze(-2)).flatten(2, 3)
    u = u.to(state.dtype).repeat(batch, 1)[:, None, None]
    scores = _across(r_read, k_written, since_start, whole) + _inside(r, k, before, reached, u)
    y = product(r_state, starts.mT, product(scores, v))
    return joined(y, heads, tokens), last.unflatten(0, (batch, heads))


Parts = Float[Tensor, "rows chunks parts part N"]


def _across(
    r: Parts, k: Parts, since_start: Float[Tensor, "rows chunks parts N"], whole: Float[Tensor, "rows chunks parts N"]
) -> Float[Tensor, "rows chunks c c"]:
    """The scores of tokens in a part with those in earlier parts: r counts from the start of its part, k up to the end
    of its own, and what lies between two parts is the same for all their tokens."""
    parts = r.shape[2]
    earlier = torch.ones(parts, parts, dtype=torch.bool, device=r.device).tril(-1).unsqueeze(-1)
    between = (since_start.unsqueeze(3) - whole.unsqueeze(2)).clamp(max=0).exp() * earlier
    keys = (k.unsqueeze(2) * between.unsqueeze(-2)).flatten(3, 4)  # (rows, chunks, parts, c, N)
    return (r @ keys.mT).flatten(2, 3)


def _inside(r: Tensor, k: Tensor, before: Parts, reached: Parts, u: Tensor) -> Float[Tensor, "rows chunks c c"]:
    """The scores of tokens with those before them in the same part, and with themselves."""
    part = reached.shape[3]
    r, k = r.unflatten(-2, (-1, part)), k.unflatten(-2, (-1, part))
    earlier = torch.ones(part, part, dtype=r.dtype, device=r.device).tril(-1)
    decay = (before.unsqueeze(-2) - reached.unsqueeze(-3)).clamp(max=0).exp()
    scores = torch.einsum("...tn,...in,...tin->...ti", r, k, decay) * earlier
    own = (r * k * u.unsqueeze(2)).sum(-1)
    scores = scores + torch.diag_embed(own)
    return _block_diagonal(scores)


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
