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
        reached: (batch, tokens), 1 + the column of the last token up to this column, itself included.
    """

    is_token: Bool[Tensor, "batch tokens 1"]
    reached: Int[Tensor, "batch tokens"]

    @property
    def previous(self) -> Int[Tensor, "batch tokens"]:
        """1 + the column of the token before each column, 0 where there is none."""
        return torch.nn.functional.pad(self.reached[:, :-1], (1, 0))

    def columns(self, start: int, stop: int) -> Padding | None:
        """The padding of a part of the columns."""
        mask = self.is_token[:, start:stop, 0]
        return padding_of(mask, *mask.shape)

    def to(self, device: torch.device) -> Padding:
        """The same on another device, where the blocks of a model are on several."""
        return Padding(self.is_token.to(device), self.reached.to(device))

    def repeat_tokens(self, x: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens hidden"]:
        """x, with each column of padding replaced by the token before it, if there was a token."""
        columns = (self.reached - 1).clamp(min=0)
        return x.gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def padding_of(attention_mask: Tensor | None, rows: int, columns: int) -> Padding | None:
    """The padding that a mask means, of its last `columns`; None where everything is a token.

    Raises:
        ShapeError: the mask is not (rows, columns) or longer.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
        raise ShapeError(f"attention_mask: got shape {tuple(attention_mask.shape)}, wanted ({rows}, {columns})")
    mask = attention_mask[:, attention_mask.shape[1] - columns :].bool()
    if bool(mask.all()):
        return None
    places = torch.arange(1, columns + 1, device=mask.device)
    return Padding(mask.unsqueeze(-1), torch.where(mask, places, 0).cummax(dim=1).values)


def token_shift(
    x: Float[Tensor, "batch tokens hidden"], before: Float[Tensor, "batch hidden"], padding: Padding | None
) -> tuple[Float[Tensor, "batch tokens hidden"], Float[Tensor, "batch hidden"]]:
    """For each column the token before it (`before` for the first), and the last token of each row.

    Columns of padding are never read, and their results mean nothing. The last token is a copy, since a view would keep
    all columns in memory for as long as the state lives.
    """
    longer = torch.cat([before.unsqueeze(1), x], dim=1)
    if padding is None:
        return longer[:, :-1], longer[:, -1].clone()
    hidden = x.shape[-1]
    previous = longer.gather(1, padding.previous.unsqueeze(-1).expand(-1, -1, hidden))
    last = longer.gather(1, padding.reached[:, -1:].unsqueeze(-1).expand(-1, 1, hidden))
    return previous, last.squeeze(1)
