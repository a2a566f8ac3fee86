"""Small models merged on disk, and the verification of what came of it."""

from pathlib import Path

import torch
from torch import nn

from flashbone import variants
from flashbone.merge import merge_checkpoint
from flashbone.merge.verify import compare_logits
from helpers.adapter_folders import blocks_for, write_adapter

LLAMA, BERT = ("q_proj", "k_proj", "o_proj", "down_proj"), ("query", "key", "dense")


def fitting_adapter(folder: Path, model: nn.Module, targets: tuple[str, ...], variant: str = "bone", **fields) -> Path:
    """Blocks whose deltas are 3% of their weights, as trained ones are."""
    blocks = {}
    for name, block in blocks_for(model, variant, targets, 6, 0.01).items():
        W = model.get_submodule(name).weight.detach().float()
        W = W.mT if type(model.get_submodule(name)).__name__ == "Conv1D" else W
        blocks[name] = block * 0.03 * W.norm() / variants.get(variant).delta(W, block).norm()
    return write_adapter(folder, variant, blocks, r=6, target_modules=list(targets), **fields)


def lively(model: nn.Module) -> nn.Module:
    """With matrices as large as trained ones: in a new model, queries and keys change next to nothing."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(10)
    return model


def write_merge(place: Path, make, targets, variant: str = "bone", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Base, adapter and merged model in `place`."""
    model = lively(make()).to(dtype)
    model.save_pretrained(place / "base")
    fitting_adapter(place / "adapter", model, targets, variant)
    merge_checkpoint(place / "base", place / "adapter", place / "out")
    return model


def verify(place: Path, *adapters: str, weights: list[float] | None = None):
    return compare_logits(place / "base", [place / a for a in adapters or ("adapter",)], weights, place / "out")
