"""What is counted without numbers, against what torch keeps of real ones and computes with them."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from flashbone import BoneConfig
from flashbone.inspect.measuring import measure
from flashbone.inspect.model import inspect_model
from helpers.adapter_folders import tiny_llama
from helpers.blocks import VARIANT_NAMES

TOKENS, R, MINI_R = 10, 8, 4
METHODS = (*VARIANT_NAMES, "orthogonal-free", "lora")
SEEN = {"q": "x", "k": "x", "o": "qk"}  # layer -> its input
TARGETS = ["q", "k", "o"]


class Branching(nn.Module):
    """q and k see the very same x; frozen, it keeps nothing of its inputs. Of k and o, R does not divide the sizes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(48, 32, dtype=dtype), nn.Linear(48, 44, dtype=dtype)
        self.o = nn.Linear(76, 50, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.cat([self.q(x), self.k(x)], -1))


def bytes_kept(model: nn.Module, *args, **kwargs) -> int:
    """Bytes of all storages that a forward pass keeps for backward, but for the parameters'; each counted once."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in parameters:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*args, **kwargs)
    assert output is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


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
def test_exactly_what_is_measured_is_kept(method, dtype, dropout):
    model = get_peft_model(Branching(dtype), config(method, dropout)).train()
    x = torch.randn(TOKENS, 48, dtype=dtype, requires_grad=True) * 1
    with torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else contextlib.nullcontext():
        kept = bytes_kept(model, x)

    # On the CPU a mask is in the dtype of what is dropped, and LoRA drops x in fp32; it is measured as GPUs keep it.
    mask_bytes = 4 if method == "lora" else dtype.itemsize
    alone, inputs = 0, {}
    for name, seen in SEEN.items():
        layer = model.base_model.model.get_submodule(name)
        cost = measure(layer, {}, TOKENS, dtype)
        alone += cost.kept_bytes + (mask_bytes - 1) * TOKENS * layer.in_features * (dropout > 0)
        inputs[seen] = cost.kept_input_bytes
    assert kept == alone + sum(inputs.values())


def test_of_a_whole_model_bone_keeps_what_is_reported(tmp_path):
    model = tiny_llama().train()
    model.config.save_pretrained(tmp_path)
    model.enable_input_require_grads()
    ids = torch.arange(24).view(2, 12)
    frozen = bytes_kept(model.requires_grad_(False), input_ids=ids)
    adapted = get_peft_model(model, BoneConfig(r=6, target_modules="all-linear"))
    report = inspect_model(tmp_path, {"r": 6}, tokens=24, dtype=torch.float32)
    assert bytes_kept(adapted, input_ids=ids) - frozen == report.costs.activation_bytes


@pytest.mark.parametrize("method", ["bone", "mini", "lora"])
def test_multiply_adds_are_those_that_torch_counts(method):
    def counted(model) -> float:
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(TOKENS, 48))
        return counter.get_total_flops() / 2 / TOKENS

    base = Branching(torch.float32)
    before = counted(base)
    model = get_peft_model(base, config(method))
    added = counted(model) - before
    layers = [model.base_model.model.get_submodule(name) for name in TARGETS]
    additions = 0 if method == "lora" else sum(layer.in_features // R * R for layer in layers)  # of S(x), no products
    measured = sum(measure(layer, {}, TOKENS, torch.float32).multiply_adds for layer in layers)
    assert measured == added + additions


OUT, IN = 32, 48


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("bone", IN + R * OUT),
        ("mini", IN + R * MINI_R),
        ("bat-row", IN * R + IN),
        ("bat-col", OUT * IN * R / TOKENS),
        ("orthogonal-free", IN * R),
        ("orthogonal", IN * R + 4 / 3 * R**3 / TOKENS),
        ("lora", R * (IN + OUT)),
    ],
)
def test_multiply_adds_are_those_of_docs_inspect(method, wanted):
    layer = get_peft_model(Branching(torch.float32), config(method)).base_model.model.q
    assert measure(layer, {}, TOKENS, torch.float32).multiply_adds == pytest.approx(wanted, rel=1e-12)
