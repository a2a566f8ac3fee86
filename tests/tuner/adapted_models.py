"""A small model of three layers with adapters of any variants, and what must not change when something is refused."""

import torch
from peft import BoneConfig, PeftModel, get_peft_model
from torch import nn

from helpers.mlp import MLP, fill_blocks

SIZES = (13, 9, 6)


def inputs(n: int = 3) -> torch.Tensor:
    return torch.randn(n, SIZES[0], dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def config(variant: str = "bone", r: int = 4, **fields) -> BoneConfig:
    return BoneConfig(**{"r": r, "variant": variant, "mini_r": 2, "target_modules": ["lin0", "lin1"]} | fields)


def adapted(*variants: str, **fields) -> PeftModel:
    """An MLP with one filled adapter for each variant, named by its position; the first is active."""
    model = get_peft_model(MLP(SIZES), config(variants[0], **fields), adapter_name="0")
    for i, variant in enumerate(variants[1:], 1):
        model.add_adapter(str(i), config(variant, r=4 - i))
    fill_blocks(model)
    return model


def snapshot(model: nn.Module) -> tuple[dict, dict, list[str]]:
    """Values, trainability and module types of a model."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, {n: p.requires_grad for n, p in model.named_parameters()}, [repr(type(m)) for m in model.modules()]


def assert_unchanged(model: nn.Module, before: tuple[dict, dict, list[str]]) -> None:
    state, trainable, kinds = snapshot(model)
    assert state.keys() == before[0].keys()
    assert all(torch.allclose(state[k], before[0][k], rtol=0, atol=0, equal_nan=True) for k in state)
    assert trainable == before[1]
    assert kinds == before[2]
