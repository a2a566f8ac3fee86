"""Sizes of random RWKV models, how long their sequences are, and how far their logits may be from the reference."""

from pathlib import Path

import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "rwkv.safetensors"
VERSIONS = (7, 6)
# hidden size, head size, blocks
SIZES = [(16, 8, 1), (32, 8, 3), (48, 16, 2), (64, 64, 2), (96, 32, 1)]
LIMIT = 2e-5  # largest difference of a logit, of the rms of all
TOKENS = 75  # two chunks and a part


def differs_by(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.square().mean().sqrt())
