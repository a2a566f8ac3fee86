"""The token before each token, with padding anywhere: what RWKV's mixes interpolate with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flashbone.errors import ShapeError


@dataclass(frozen=True)
class Padding:
    """Which columns of a batch are tokens, where some are not.

    Attributes:
        is_token: (batch, tokens, 1).
        previous: (batch, tokens), 1 + the column of the token before this column, 0 where there is none.
        last: (batch,), 1 + the column of the last token, 0 where a row has none.
    """

    is_token: Bool[Tensor, "batch tokens 1"]
    previous: Int[Tensor, "batch tokens"]
    last: Int[Tensor, " batch"]

    def columns(self, start: int, stop: int) -> Padding | None:
        """The padding of a part of the columns."""
        return padding_of(self.is_token[:, start:stop, 0])


def padding_of(attention_mask: Tensor | None, columns: int | None = None) -> Padding | None:
    """The padding that a mask means, of its last `columns`; None where everything is a token.

    Raises:
        ShapeError: the mask is not (batch, tokens), or too short.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or (columns is not None and attention_mask.shape[1] < columns):
        wanted = f"(batch, {columns or 'tokens'})"
        raise ShapeError(f"attention_mask: got shape {tuple(attention_mask.shape)}, wanted {wanted}")
    mask = attention_mask[:, attention_mask.shape[1] - (columns or attention_mask.shape[1]) :].bool()
    if bool(mask.all()):
        return None
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    reached = torch.where(mask, places, 0).cummax(dim=1).values
    previous = torch.nn.functional.pad(reached[:, :-1], (1, 0))
    return Padding(mask.unsqueeze(-1), previous, reached[:, -1])


def token_shift(
    x: Float[Tensor, "batch tokens hidden"], before: Float[Tensor, "batch hidden"], padding: Padding | None
) -> tuple[Float[Tensor, "batch tokens hidden"], Float[Tensor, "batch hidden"]]:
    """For each column the token before it (`before` for the first), and the last token of each row.

    What stands in columns of padding is never read, and what is returned for them means nothing.
    """
    if padding is None:
        return torch.cat([before.unsqueeze(1), x[:, :-1]], dim=1), x[:, -1]
    longer = torch.cat([before.unsqueeze(1), x], dim=1)
    hidden = x.shape[-1]
    previous = longer.gather(1, padding.previous.unsqueeze(-1).expand(-1, -1, hidden))
    last = longer.gather(1, padding.last.view(-1, 1, 1).expand(-1, 1, hidden))
    return previous, last.squeeze(1)
