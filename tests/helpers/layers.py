"""What the tests of every kind of layer do with one: fill its blocks, compare it with the oracle, take it around."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import BoneConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from helpers import reference
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import fill_blocks


def adapted(model: nn.Module, *variants: str, sizes: tuple[int, ...] = (3, 2), **fields) -> PeftModel:
    """A model with one filled adapter for each variant, named "x", "y", ...; all of them are active."""
    configs = [
        BoneConfig(**{"r": sizes[i % len(sizes)], "mini_r": 2, "variant": variant} | fields)
        for i, variant in enumerate(variants)
    ]
    names = list("xyz"[: len(variants)])  # no numbers: PEFT would take those of layers for them
    peft_model = get_peft_model(model, configs[0], names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        peft_model.add_adapter(name, config)
    peft_model.base_model.set_adapter(names)
    fill_blocks(peft_model)
    return peft_model


def oracle_weight(W: Tensor, variant: str, block: Tensor, scale: float = 1) -> Tensor:
    """W (out, in), or one for each expert, with an adapter in it, in fp64."""
    if W.ndim == 3:
        return torch.stack([oracle_weight(*pair, scale) for pair in zip(W, [variant] * len(W), block, strict=True)])
    return W.double() + scale * reference.delta(variant, W, block)


def gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Of an uneven sum of the output."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return list(torch.autograd.grad((output * weights).sum(), tensors))


def check_lifecycle(model: PeftModel, run: Callable[[nn.Module], Tensor], fresh: Callable[[], nn.Module], tmp: Path):
    """Merge, unmerge, scales, disabling, files and unloading of a filled model, whose adapters "x" and "y" are active
    (and "x" after that): all as for a linear layer."""
    base, both = run(fresh()), run(model)
    assert not close(both, base)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        model.merge_adapter()
        assert close(run(model), both)
        model.unmerge_adapter()
    assert all(same_bits(tensor, state[name], Promise.UNTOUCHED) for name, tensor in model.state_dict().items())
    with model.disable_adapter():
        assert close(run(model), base)  # torch takes a fast path, which rounds otherwise, where nothing is trained
    model.base_model.set_scale("y", 0.0)
    alone = run(model)
    model.base_model.set_scale("y", 1.0)
    model.set_adapter("x")
    assert close(run(model), alone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of embeddings that PEFT saves along
        model.save_pretrained(tmp)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(fresh(), tmp / "y", low_cpu_mem_usage=low_cpu_mem_usage)
        again.load_adapter(tmp / "x", "x", low_cpu_mem_usage=low_cpu_mem_usage)
        again.set_adapter("x")
        assert close(run(again), alone)
    assert close(run(model.merge_and_unload(adapter_names=["x", "y"])), both)
    assert close(run(again.unload()), base)
