"""The formulas of what is kept and computed, against what torch keeps and computes."""

import contextlib
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from flashbone import BoneConfig
from flashbone.inspect.costs import Setting, kept, multiply_adds
from flashbone.inspect.model import inspect_model
from flashbone.ops.bat_col import weight_delta
from flashbone.ops.bat_row import shift_input
from flashbone.ops.rotation import rotate_input
from helpers.adapter_folders import tiny_llama
from helpers.blocks import VARIANT_NAMES

TOKENS, R, MINI_R = 10, 8, 4
METHODS = (*VARIANT_NAMES, "orthogonal-free", "lora")
SETTING = Setting(TOKENS, 4, casts=False, dropout=False)
TARGETS = ["q", "k", "o"]


class Branching(nn.Module):
    """q and k see the very same x; frozen, it keeps nothing of its inputs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(48, 32, dtype=dtype), nn.Linear(48, 40, dtype=dtype)
        self.o = nn.Linear(72, 48, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.cat([self.q(x), self.k(x)], -1))


def bytes_kept(model: nn.Module, *args, **kwargs) -> int:
    """Bytes of all storages that a forward pass keeps for backward, but for the parameters'; each counted once."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in parameters:
            found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*args, **kwargs)
    assert output is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def config(method: str, dropout: float = 0.0):
    if method == "lora":
        return LoraConfig(r=R, lora_dropout=dropout, target_modules=TARGETS)
    fields = {"use_orthogonal": False} if method.endswith("-free") else {}
    return BoneConfig(
        r=R, variant=method.removesuffix("-free"), mini_r=MINI_R, dropout=dropout, target_modules=TARGETS, **fields
    )


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_exactly_what_the_formula_says_is_kept(method, dtype, dropout):
    model = get_peft_model(Branching(dtype), config(method, dropout)).train()
    x = torch.randn(TOKENS, 48, dtype=dtype, requires_grad=True) * 1
    half = dtype == torch.bfloat16
    with torch.autocast("cpu", dtype) if half else contextlib.nullcontext():
        measured = bytes_kept(model, x)

    # On the CPU a mask is in the dtype of what is dropped, and LoRA drops x in fp32.
    mask_bytes = 4 if method == "lora" else dtype.itemsize
    free = method.endswith("-free")
    method = method.removesuffix("-free")
    setting = Setting(TOKENS, dtype.itemsize, half, dropout > 0, not free, mask_bytes=mask_bytes)
    own, inputs = 0, {}
    for name, seen in (("q", "x"), ("k", "x"), ("o", "qk")):
        layer = model.base_model.model.get_submodule(name)
        size = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        found = kept(method, layer.in_features, R, size, setting)
        own, inputs[seen] = own + found.own, found.input
    assert measured == own + sum(inputs.values())


def test_of_a_whole_model_bone_keeps_what_is_reported(tmp_path):
    model = tiny_llama().train()
    model.config.save_pretrained(tmp_path)
    model.enable_input_require_grads()
    ids = torch.arange(24).view(2, 12)
    frozen = bytes_kept(model.requires_grad_(False), input_ids=ids)
    adapted = get_peft_model(model, BoneConfig(r=6, target_modules="all-linear"))
    report = inspect_model(tmp_path, {"r": 6}, tokens=24, dtype=torch.float32)
    assert bytes_kept(adapted, input_ids=ids) - frozen == report.costs.activation_bytes


def counted(call, *args) -> float:
    """Multiply-adds of the products in a call, for each token, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops() / 2 / TOKENS


@pytest.mark.parametrize(("method", "width"), [("bone", None), ("mini", MINI_R), ("lora", None)])
def test_multiply_adds_are_those_that_torch_counts(method, width):
    x = torch.randn(TOKENS, 48)
    base = Branching(torch.float32)
    before = counted(base, x)
    added = counted(get_peft_model(base, config(method)), x) - before
    sizes = ((32, 48), (40, 48), (48, 72))
    sums = 0 if method == "lora" else sum(in_features for _, in_features in sizes)  # additions, no products
    formula = sum(multiply_adds(method, out, in_features, R, width or out, SETTING) for out, in_features in sizes)
    assert added == formula - sums


@pytest.mark.parametrize("in_features", [48, 44])
def test_multiply_adds_of_the_moves_are_those_that_torch_counts(in_features):
    x, n = torch.randn(TOKENS, in_features), -(-in_features // R)
    D, W = torch.randn(n, R, R), torch.randn(n * R, in_features)
    free = Setting(TOKENS, 4, casts=False, dropout=False, use_orthogonal=False)
    assert counted(partial(shift_input, composite=True), x, D, None) == multiply_adds(
        "bat-row", 32, in_features, R, R, SETTING
    )
    assert counted(partial(rotate_input, composite=True), x, D[0], None) == multiply_adds(
        "orthogonal", 32, in_features, R, R, free
    )
    padded = n * R  # bat-col pads its weight
    assert counted(weight_delta, W, D) == multiply_adds("bat-col", n * R, padded, R, R, SETTING)
