"""The registry of variants: for each its block, its moves and its delta. Formulas: docs/maths.md; arXiv 2409.15371."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashbone.errors import ConfigError, ShapeError
from flashbone.variants.base import Variant
from flashbone.variants.bat_col import BatCol
from flashbone.variants.bat_row import BatRow
from flashbone.variants.bone import Bone
from flashbone.variants.merged import merged_weight as merged_weight
from flashbone.variants.mini import Mini
from flashbone.variants.orthogonal import Orthogonal

VARIANTS: dict[str, type[Variant]] = {kind.name: kind for kind in (Bone, Mini, BatCol, BatRow, Orthogonal)}
DEFAULT = Bone.name


def get(name: str, **settings: Any) -> Variant:
    """The variant of that name; `settings` are its fields (`use_orthogonal` and `eps` of "orthogonal").

    Raises:
        ConfigError: no variant has that name.
    """
    if name not in VARIANTS:
        raise ConfigError(f"variant: got {name!r}, wanted one of {', '.join(map(repr, VARIANTS))}")
    return VARIANTS[name](**settings)


def from_fields(name: str, fields: Mapping[str, Any]) -> Variant:
    """The variant of that name, with its settings from the fields of a BoneConfig or an adapter_config.json.

    Raises:
        ConfigError: no variant has that name.
    """
    kind = type(get(name))
    return kind(**{setting: fields[field] for field, setting in kind.config_fields.items()})


def by_tool_name(attribute: str) -> dict[Any, type[Variant]]:
    """Variants by what another tool calls them: "peft_init_weights", "miss_init_weights" or "rwkv_peft_mode"."""
    return {name: kind for kind in VARIANTS.values() if (name := getattr(kind, attribute)) is not None}


def of_size_field(field: str) -> type[Variant]:
    """The variant whose block size a field of BoneConfig besides r sets, such as "bottleneck_size"."""
    return next(kind for kind in VARIANTS.values() if kind.size_field == field)


def random_block_(block: Tensor) -> Tensor:
    """Fill a block in place with the random start that PEFT gives to `init_weights=False` (for tests)."""
    return torch.nn.init.kaiming_uniform_(block, a=math.sqrt(5))


def check_block(where: str, variant: Variant, block: Tensor, out_features: int, in_features: int) -> None:
    """Check that a block read from a file fits a layer; r and mini_r are the block's own.

    Raises:
        ShapeError: it does not.
    """
    if block.ndim == dimensions(variant) and all(block.shape):
        r, mini_r = block.shape[-2], block.shape[-1]
        try:
            wanted = variant.block_shape(out_features, in_features, r, mini_r)
        except ShapeError as error:
            raise ShapeError(f"{where}: {error}") from None
        if tuple(block.shape) == wanted:
            return
    raise ShapeError(
        f"{where}: a {variant.name} block of shape {tuple(block.shape)} does not fit a layer with {out_features} output"
        f" and {in_features} input features; is it an adapter of another model or variant?"
    )


def dimensions(variant: Variant) -> int:
    """Number of axes of the variant's block."""
    return len(variant.block_shape(1, 1, 1, 1))
