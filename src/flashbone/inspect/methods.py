"""The two methods that are compared on the same layers: the adapter that was attached, and a LoRA of the same size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flashbone.inspect.attached import BLOCK, Attached, Layer
from flashbone.inspect.costs import LORA, Kept, Setting, kept, multiply_adds

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Method:
    """A way to adapt layers.

    Attributes:
        name: a variant, or "lora".
        r: block size or rank; of single layers `layer_r`.
        layer_r: layer -> its block size or rank.
        shapes: layer -> its trained tensors, by the suffix of their names in the adapter file.
    """

    name: str
    r: int
    layer_r: Callable[[Layer], int]
    shapes: Callable[[Layer], Shapes]

    def parameters(self, layer: Layer) -> int:
        """Trained numbers of a layer."""
        return sum(map(math.prod, self.shapes(layer).values()))

    def kept(self, layer: Layer, setting: Setting) -> Kept:
        """What one call of the layer keeps."""
        return kept(self.name, layer.in_features, self.layer_r(layer), self.parameters(layer), setting)

    def multiply_adds(self, layer: Layer, setting: Setting) -> float:
        """What all calls of the layer in one forward pass compute, for each token."""
        width = layer.block.shape[-1]
        sizes = (layer.out_features, layer.in_features, self.layer_r(layer), width)
        return layer.calls * multiply_adds(self.name, *sizes, setting)


def attached_method(found: Attached) -> Method:
    """The adapter as it was attached."""
    config = found.config
    return Method(config.variant, config.r, lambda layer: layer.r, lambda layer: {BLOCK: tuple(layer.block.shape)})


def lora_twin(found: Attached) -> Method:
    """A LoRA of one rank on the same layers, with the rank that comes nearest in trained numbers."""
    size = sum(layer.block.numel() for layer in found.layers)
    rank = max(1, round(size / sum(layer.in_features + layer.out_features for layer in found.layers)))

    def shapes(layer: Layer) -> Shapes:
        return {".lora_A.weight": (rank, layer.in_features), ".lora_B.weight": (layer.out_features, rank)}

    return Method(LORA, rank, lambda layer: rank, shapes)
