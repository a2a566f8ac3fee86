"""The L2-wrap of RWKV's own training: it keeps the largest logit of each token small."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FACTOR = 1e-4


def l2_wrap(
    loss: Float[Tensor, ""],
    logits: Float[Tensor, "batch tokens vocabulary"],
    learned: Bool[Tensor, "batch tokens"] | None = None,
    items: Tensor | int | None = None,
    factor: float = FACTOR,
) -> Float[Tensor, ""]:
    """The loss with the same value, whose gradient has that of factor / 2 * mean(max logit ^ 2) added.

    Args:
        loss: Mean over the learned tokens.
        logits: What it came from.
        learned: Which columns of logits are learned; None: all.
        items: Tokens that the mean is over, where they are more than these (gradient accumulation).
        factor: 1e-4 in RWKV-LM and RWKV-PEFT.
    """
    largest = logits.float().amax(-1)
    weights = torch.ones_like(largest) if learned is None else learned.to(largest.dtype)
    return wrapped(loss, (largest.square() * weights).sum(), weights.sum() if items is None else items, factor)


def wrapped(loss: Tensor, squares: Tensor, items: Tensor | int, factor: float = FACTOR) -> Tensor:
    """As `l2_wrap`, from the sum of the squares."""
    penalty = factor / 2 * squares / (items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1))
    return loss + (penalty - penalty.detach())
