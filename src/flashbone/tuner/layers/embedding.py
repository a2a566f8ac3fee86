"""BoneEmbedding: an embedding with adapters, a linear layer on one-hot rows. W is the transposed table, (dim, ids)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashbone import shards
from flashbone.errors import ConfigError
from flashbone.tuner.layers.kinds import TRANSPOSED, BaseKind
from flashbone.tuner.layers.layer import BoneLinear
from flashbone.tuner.layers.shifts import by_rows, call_shifted, check_no_dropout, terms
from flashbone.variants import Variant


class BoneEmbedding(BoneLinear):
    """An `nn.Embedding` with adapters of the variants bone and mini: `y = base(ids) + scale * B[ids mod r]`.

    The row of `padding_idx` is shifted and trained like the others, so that forward, gradient and merge agree on one
    matrix. Nothing as large as the table is made.
    """

    converts_to_lora = False

    def _kind_of(self, base: nn.Module) -> BaseKind:
        return TRANSPOSED

    def _checked_variant(self, variant: Variant, dropout: float) -> Variant:
        base: Any = self.get_base_layer()
        if variant.delta_depends_on_weight:
            raise ConfigError(
                f"the variant {variant.name!r} multiplies the weight of {type(base).__name__}, all of its"
                f" {self.in_features} rows in every call; use 'bone' or 'mini' for it, or leave the layer out"
            )
        if base.max_norm is not None:
            raise ConfigError(
                f"{type(base).__name__} has max_norm={base.max_norm}, which rescales its rows in every call and"
                " undoes any shift of them; leave the layer out, or set its max_norm to None"
            )
        if not _looks_up_ids(base):
            check_no_dropout(base, dropout)
        return variant

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's rows with the shifts of all active adapters; ids (...) -> (..., dim)."""
        return by_rows(self, ids, lambda rows, names: self._run(rows, names, *args, **kwargs))

    def _run(self, ids: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _looks_up_ids(self.get_base_layer()):
            return call_shifted(self, names, (ids, *args), kwargs)
        y = self.base_layer(ids)
        if not names:
            return y
        factor = self._get_embed_scale()
        for name, (_, block, scale) in zip(names, terms(self, names), strict=True):
            rows = F.embedding(ids % block.shape[0], block * scale if scale != 1 else block)
            dropout = self.bone_dropout[name]
            if self.training and isinstance(dropout, nn.Dropout):  # of the one-hot input: a row is kept or not
                rows = rows * dropout(torch.ones_like(rows[..., :1]))
            rows = rows.to(y.dtype)
            y = shards.add_tiled(y, rows if factor is None else rows * factor.to(y.dtype))
        return y


def _looks_up_ids(base: nn.Module) -> bool:
    """Whether a call returns the rows of its argument, at most times `embed_scale`. Learned positions, for example,
    compute the ids themselves."""
    return type(base).forward is nn.Embedding.forward or hasattr(base, "embed_scale")
