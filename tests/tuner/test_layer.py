"""One layer with adapters: forward and gradients against the oracle, scales, dropout, hooks, other bases."""

import pytest
import torch
from adapted_layers import IN, OUT, THREE, adapt, make_layer, oracle, pristine
from torch import nn

from flashbone import BoneLayer, BoneLinear
from flashbone.errors import ConfigError
from helpers import reference
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits


class Doubled(nn.Linear):
    """A linear layer that does more than its matrix product."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("adapters", [{"a": "bat-col"}, THREE])
def test_bases_with_a_forward_or_hooks_of_their_own_are_called(adapters):
    layer = adapt(Doubled(IN, OUT).double(), adapters, std=0.0)
    x = torch.randn(2, IN, dtype=torch.float64)
    assert close(layer(x), layer.base_layer(x))
    layer = adapt(make_layer(), adapters)
    want = layer(x)
    calls = []
    layer.base_layer.register_forward_hook(lambda module, args, output: calls.append(output))
    assert close(layer(x), want)
    assert len(calls) == 1


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_blocks_that_hosts_keep_elsewhere_are_found(name):
    layer, x = adapt(make_layer(), {"a": name}), torch.randn(2, IN, dtype=torch.float64)
    want = layer(x).detach()
    assert not close(want, layer.base_layer(x))
    block = layer.bone_block._parameters.pop("a")  # as FSDP and nn.DataParallel do
    layer.bone_block.__dict__["a"] = block
    assert close(layer(x), want)
    del layer.bone_block.__dict__["a"]
    layer.bone_block._parameters["a"] = block
    nn.utils.parametrize.register_parametrization(layer.bone_block, "a", nn.Identity())
    assert close(layer(x), want)


class Scaled(nn.Linear):
    def forward(self, x, factor=1.0, *, shift=0.0):
        return factor * super().forward(x) + shift


def test_further_arguments_reach_the_base():
    layer, x = adapt(Scaled(IN, OUT).double(), {"a": "bone"}, std=0.0), torch.randn(2, IN, dtype=torch.float64)
    assert close(layer(x, 2.0, shift=1.0), layer.base_layer(x, 2.0, shift=1.0))


def test_global_hooks_see_the_bases_own_output():
    layer, x, seen = adapt(make_layer(), {"a": "bone"}), torch.randn(2, IN, dtype=torch.float64), []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(output) if module is layer.base_layer else None
    )
    try:
        layer(x)
    finally:
        hook.remove()
    assert close(seen[0], layer.base_layer(x))


def test_a_parametrised_weight_is_adapted_but_not_merged():
    base = nn.utils.parametrizations.weight_norm(make_layer())
    layer, x = adapt(base, {"a": "bone"}), torch.randn(2, IN, dtype=torch.float64)
    assert close(layer(x), oracle(layer, x, base.weight.detach()))
    with pytest.raises(ConfigError, match="computed by a parametrisation"):
        layer.merge()


@pytest.mark.parametrize("name", ["bone", "mini"])
def test_large_activations_do_not_overflow_in_fp16(name):
    base = make_layer(dtype=torch.float16, in_=11008, out=8)
    layer = adapt(base, {"a": name}, r=64, std=1e-3)
    x = torch.full((1, 11008), 500.0, dtype=torch.float16)
    assert close(layer(x) - base(x), oracle(layer, x, pristine(base) * 0) - base.bias.double(), torch.bfloat16)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_scales_multiply_what_the_adapter_adds(name):
    base = make_layer()
    layer, x = adapt(base, {"a": name}), torch.randn(4, IN, dtype=torch.float64)
    plain = base(x)
    full = layer(x) - plain
    layer.set_scale("a", 0.25)
    assert close(layer(x) - plain, 0.25 * full)
    layer.scale_layer(2.0)
    assert close(layer(x) - plain, 0.5 * full)
    layer.unscale_layer(4.0)
    assert close(layer(x) - plain, 0.125 * full)
    layer.merge()
    assert close(layer(x) - plain, 0.125 * full)
    layer.unmerge()
    layer.unscale_layer()
    assert close(layer(x) - plain, full)
    layer.set_scale("no such adapter", 3.0)
    assert layer.bone_scale == {"a": 1.0}


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_dropout_acts_on_the_adapters_input_and_never_on_the_bases(name):
    base = make_layer()
    layer, x = adapt(base, {"a": name}, dropout=0.5), torch.randn(200, IN, dtype=torch.float64)
    W = pristine(base)
    delta = reference.delta(name, W, layer.bone_block["a"].detach())
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    assert close(got, base(x) + dropped @ delta.T)
    layer.eval()
    assert close(layer(x), oracle(layer, x, W))


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_dropout_gradients_follow_autograd_on_the_delta(name):
    base = make_layer()
    layer = adapt(base, {"a": name}, dropout=0.5)
    x = torch.randn(20, IN, dtype=torch.float64)
    torch.manual_seed(3)
    layer(x).square().sum().backward()
    block = layer.bone_block["a"].detach().requires_grad_()
    torch.manual_seed(3)
    want = base(x) + nn.functional.dropout(x, 0.5) @ reference.delta(name, pristine(base), block).T
    want.square().sum().backward()
    assert close(layer.bone_block["a"].grad, block.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapters", [*({"a": v} for v in VARIANT_NAMES), THREE])
def test_a_half_precision_base_with_fp32_adapters(adapters, dtype):
    base = make_layer(dtype=dtype, out=66, in_=130)
    layer = adapt(base, adapters, r=16, std=0.05)
    layer.bone_block.to(torch.float32)
    x = torch.randn(5, 130, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert close(y, oracle(layer, x, pristine(base)), dtype)
    y.float().square().sum().backward()
    assert all(block.grad.dtype == torch.float32 and block.grad.abs().sum() > 0 for block in layer.bone_block.values())
    layer.merge()
    assert base.weight.dtype == dtype
    assert close(layer(x), y.detach(), dtype)


@pytest.mark.parametrize("adapters", [*({"a": v} for v in VARIANT_NAMES), THREE])
def test_autocast_runs_the_adapter_in_the_dtype_of_the_base(adapters):
    layer = adapt(make_layer(dtype=torch.float32, out=66, in_=130), adapters, r=16, std=0.05)
    x = torch.randn(5, 130)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert close(y, oracle(layer, x, pristine(layer.base_layer)), torch.bfloat16)
    assert all(block.grad.dtype == torch.float32 for block in layer.bone_block.values())


@pytest.mark.parametrize("name", ["bone", "mini"])
def test_large_activations_do_not_overflow_under_autocast_to_fp16(name):
    layer = adapt(make_layer(dtype=torch.float32, in_=11008, out=8), {"a": name}, r=64, std=1e-3)
    x = torch.full((1, 11008), 500.0)
    with torch.autocast("cpu", torch.float16):
        difference = layer(x) - layer.base_layer(x)
    bias = layer.base_layer.bias.double()
    assert close(difference, oracle(layer, x, pristine(layer.base_layer) * 0) - bias, torch.bfloat16)


@pytest.mark.parametrize("adapters", [*({"a": v} for v in VARIANT_NAMES), THREE])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(adapters, reentrant):
    from torch.utils.checkpoint import checkpoint

    layer, x = adapt(make_layer(), adapters), torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=reentrant)):
        y = run()
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.bone_block.values()])])
        if reentrant:
            break
    if reentrant:  # torch.autograd.grad is not for reentrant checkpointing
        y = checkpoint(layer, x, use_reentrant=True)
        y.square().sum().backward()
        results.append([y, x.grad, *(block.grad for block in layer.bone_block.values())])
    for got, want in zip(*results, strict=True):
        assert same_bits(got, want, Promise.SAME_PRODUCT)


def test_old_signatures_still_work():
    layer = BoneLinear(nn.Linear(8, 8), "default", r=4, init_weights="bat", bias=True)
    assert layer.bone_block["default"].shape == (2, 4, 4)
    layer.update_layer("other", 2, False, inference_mode=True)
    assert layer.bone_block["other"].shape == (2, 8)
    assert layer.bone_block["other"].abs().sum() > 0
    assert not layer.bone_block["other"].requires_grad
    assert isinstance(layer, BoneLayer)
    assert repr(layer).startswith("bone.BoneLinear(")
    assert layer.bone_r == {"default": 4, "other": 2}
    layer.update_layer("third", 2, "gaussian")  # PEFT's layer asks for "bat" only
    assert layer.bone_variant["third"].name == "bone"
    assert not layer.bone_block["third"].any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: BoneLinear(nn.Linear(4, 4), "a", r=0),
            "`r` should be a positive integer value but the value passed is 0",
        ),
        (lambda: BoneLinear(nn.Linear(4, 4), "a", r=-2), "`r` should be a positive integer"),
        (
            lambda: BoneLinear(nn.Linear(4, 4), "a", r=2, variant="bta"),
            "variant: got 'bta', wanted one of 'bone', 'mini'",
        ),
        (lambda: BoneLinear(nn.Embedding(4, 4), "a", r=2), "it is an Embedding, and only torch.nn.Linear"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
