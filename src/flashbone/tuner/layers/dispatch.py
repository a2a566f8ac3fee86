"""Which layer class goes on which base layer, and what to say where there is none."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from flashbone.tuner.layers import bases
from flashbone.tuner.layers.attention import BoneOutProj
from flashbone.tuner.layers.conv import CONVOLUTIONS, BoneConv
from flashbone.tuner.layers.embedding import BoneEmbedding
from flashbone.tuner.layers.layer import BoneLinear
from flashbone.tuner.layers.quantized import quantized_kind_of

_KINDS = "nn.Linear, transformers' Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d and nn.Embedding"
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layer_class(base: nn.Module) -> type[BoneLinear]:
    """The class that adapts a base layer for which `why_not` has nothing to say."""
    if isinstance(base, CONVOLUTIONS):
        return BoneConv
    if isinstance(base, nn.Embedding):
        return BoneEmbedding
    return BoneOutProj if isinstance(base, NonDynamicallyQuantizableLinear) else BoneLinear


def why_not(base: nn.Module) -> str | None:
    """Why the family cannot adapt this module, and what would work; None if it can."""
    if isinstance(base, (*CONVOLUTIONS, nn.Embedding)) and not isinstance(base, _TRANSPOSED):
        weight = base.weight
        if weight.is_floating_point() and not hasattr(weight, "tensor_data_names"):
            return None
        kind = type(base).__name__
        return f"it is a quantised {kind}, and of quantised layers only linear ones are supported; leave it out"
    reason = bases.unsupported_reason(base)
    if reason is None or quantized_kind_of(base) is not None:
        return reason
    kind = type(base).__name__
    it_is = f"it is {bases.article(kind)} {kind}"
    if isinstance(base, nn.MultiheadAttention):
        own = "in_proj_weight" if base._qkv_same_embed_dim else "q_proj_weight, k_proj_weight and v_proj_weight"
        return f"{it_is}; name its out_proj instead, and its {own} in target_parameters"
    if isinstance(base, _TRANSPOSED):
        return f"{it_is}, and of convolutions only those that are not transposed are supported; leave it out"
    if isinstance(base, (nn.RNNBase, nn.RNNCellBase)):
        return f"{it_is}, whose weights no variant is defined for; leave it out"
    if isinstance(base, nn.EmbeddingBag):
        return f"{it_is}, which adds rows up by itself; nn.Embedding is supported; leave it out"
    inside = [name for name, p in base.named_parameters(recurse=False) if p.ndim in (2, 3)]
    if inside and not isinstance(base, nn.Bilinear):
        return f"{it_is}; its {', '.join(inside)} can be named in target_parameters; as layers, {_KINDS} are supported"
    return f"{it_is}, and only {_KINDS} are supported; leave it out"
