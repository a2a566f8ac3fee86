"""BoneLinear on torch.nn.Linear and Conv1D: forward, merging, scales, dropout, dtypes, several adapters."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flashbone import BoneLayer, BoneLinear
from flashbone.errors import ConfigError, FlashboneError, NonFiniteError
from flashbone.ops import reference
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import close, relative_error

OUT, IN = 11, 13


def make_layer(kind: str = "Linear", dtype: torch.dtype = torch.float64, out: int = OUT, in_: int = IN) -> nn.Module:
    base = nn.Linear(in_, out) if kind == "Linear" else Conv1D(out, in_)
    base.weight.data = torch.randn(base.weight.shape) / in_**0.5
    base.bias.data = torch.randn(out)
    return base.to(dtype)


def adapt(base: nn.Module, adapters: dict[str, str], std: float = 0.3, r: int = 3, **fields) -> BoneLinear:
    """A layer with adapters given as name -> variant, of growing block size, all active."""
    layer = None
    for i, (name, variant) in enumerate(adapters.items()):
        kwargs = {"variant": variant, "mini_r": 2, **fields}
        if layer is None:
            layer = BoneLinear(base, name, r + i, True, **kwargs)
        else:
            layer.update_layer(name, r + i, True, **kwargs)
        block = random_block(variant, layer.out_features, layer.in_features, r + i, mini_r=2, std=std)
        layer.bone_block[name].data = block.to(layer.bone_block[name])
    layer.set_adapter(list(adapters))
    return layer


def oracle(layer: BoneLinear, x: torch.Tensor, W: torch.Tensor, names: list[str] | None = None) -> torch.Tensor:
    names = layer.active_adapters if names is None else names
    adapters = [(layer.bone_variant[n].name, layer.bone_block[n].detach(), layer.bone_scale[n]) for n in names]
    return reference.forward(x, W, layer.get_base_layer().bias.detach(), adapters)


def pristine(base: nn.Module) -> torch.Tensor:
    """(out, in), cloned."""
    weight = base.weight.detach().clone()
    return weight.T if isinstance(base, Conv1D) else weight


THREE = {"a": "bat-row", "b": "bone", "c": "bat-col"}


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("adapters", [*({"a": v} for v in VARIANT_NAMES), THREE, THREE | {"d": "mini", "e": "bat-col"}])
def test_forward_merge_and_unmerge_follow_the_oracle(kind, adapters):
    base = make_layer(kind)
    W, x = pristine(base), torch.randn(4, IN, dtype=torch.float64)
    layer = adapt(base, adapters)
    want = oracle(layer, x, W)
    assert close(layer(x), want)
    layer.merge()
    assert close(layer(x), want)
    blocks = [(layer.bone_variant[n].name, layer.bone_block[n].detach()) for n in adapters]
    assert close(pristine(base), W + sum(reference.delta(variant, W, block) for variant, block in blocks))
    layer.unmerge()
    assert torch.equal(pristine(base), W)
    assert close(layer(x), want)


@pytest.mark.parametrize("name", VARIANT_NAMES)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_get_delta_weight_is_the_difference_also_while_merged(kind, name):
    base = make_layer(kind)
    before = base.weight.detach().clone()
    layer = adapt(base, {"a": name})
    layer.set_scale("a", -0.5)
    delta = layer.get_delta_weight("a")
    layer.merge()
    assert close(base.weight.detach() - before, delta)
    assert torch.equal(layer.get_delta_weight("a"), delta)
    assert torch.equal(layer.get_delta_weight("a", before), delta)
    assert layer.supports_lora_conversion()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("adapters", [*({"a": v} for v in VARIANT_NAMES), THREE])
def test_merging_and_unmerging_100_times_is_bit_exact(adapters, dtype):
    base = make_layer(dtype=dtype)
    before = base.weight.detach().clone()
    layer = adapt(base, adapters)
    merged = []
    for i in range(100):
        layer.merge(safe_merge=bool(i % 2))
        merged.append(base.weight.detach().clone())
        layer.unmerge()
    assert torch.equal(base.weight, before)
    assert all(torch.equal(weight, merged[0]) for weight in merged)
    assert relative_error(merged[0], before) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_order_of_merges_does_not_change_a_bit(dtype):
    base = make_layer(dtype=dtype)
    layer = adapt(base, THREE)
    weights = []
    for order in (["a", "b", "c"], ["c", "a", "b"]):
        layer.merge(adapter_names=order)
        weights.append(base.weight.detach().clone())
        layer.unmerge()
    layer.merge(adapter_names=["b"])
    for name in ["c", "a"]:
        with pytest.warns(UserWarning, match="additionally merging"):
            layer.merge(adapter_names=[name])
    weights.append(base.weight.detach().clone())
    assert layer.merged_adapters == ["b", "c", "a"]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_a_safe_merge_that_fails_changes_nothing(name, bad):
    base = make_layer()
    before = base.weight.detach().clone()
    layer = adapt(base, {"a": name})
    layer.bone_block["a"].data.flatten()[0] = bad
    with pytest.raises(NonFiniteError, match=r"adapter 'a': the merged weight would hold .* NaN or infinite"):
        layer.merge(safe_merge=True)
    assert torch.equal(base.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("adapters", [*({"a": v} for v in VARIANT_NAMES), {"a": "bone", "b": "bat-col", "c": "mini"}])
@pytest.mark.parametrize("size", [(12, 12), (11, 13), (5, 4)], ids=str)
def test_without_the_original_unmerging_computes_the_base_back(size, adapters):
    base = make_layer(out=size[0], in_=size[1])
    before = base.weight.detach().clone()
    layer = adapt(base, adapters, std=0.1)
    layer.keep_original = False
    layer.merge()
    assert layer._original_weight is None
    layer.unmerge()
    assert relative_error(base.weight, before) < 1e-13


def test_without_the_original_two_adapters_that_need_the_weight_are_refused():
    base = make_layer()
    before = base.weight.detach().clone()
    layer = adapt(base, {"a": "bat-row", "b": "bat-col"})
    layer.keep_original = False
    with pytest.raises(FlashboneError, match="not be taken back: two of these adapters depend on the base weight"):
        layer.merge()
    assert torch.equal(base.weight, before)
    layer.keep_original = True
    layer.merge()
    layer.unmerge()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("name", ["bat-col", "bat-row"])
def test_without_the_original_a_merge_that_cannot_be_inverted_is_refused(name):
    base = make_layer(out=12, in_=12)
    before = base.weight.detach().clone()
    layer = adapt(base, {"a": name})
    layer.bone_block["a"].data = -torch.eye(3, dtype=torch.float64).expand(4, 3, 3).clone()
    layer.keep_original = False
    with pytest.raises(FlashboneError, match="was multiplied is nearly singular; leave keep_original on"):
        layer.merge()
    assert torch.equal(base.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("keep", [True, False])
def test_a_merge_that_stands_sees_neither_new_scales_nor_new_blocks(keep):
    base = make_layer()
    before = base.weight.detach().clone()
    layer = adapt(base, {"a": "bat-col", "b": "bone"}, std=0.1)
    layer.keep_original = keep
    layer.merge(adapter_names=["a"])
    alone = base.weight.detach() - before
    layer.set_scale("a", 0.5)
    layer.bone_block["a"].data.mul_(3)
    with pytest.warns(UserWarning, match="additionally merging"):
        layer.merge(adapter_names=["b", "b"])
    assert layer.merged_adapters == ["a", "b"]
    assert close(base.weight.detach() - before, alone + layer.get_delta_weight("b"), torch.float32)
    layer.unmerge()
    assert relative_error(base.weight, before) < (1e-30 if keep else 1e-13)


def test_merging_in_inference_mode_leaves_a_weight_that_can_be_used_in_training():
    base = make_layer()
    layer = adapt(base, {"a": "bat-row"})
    with torch.inference_mode():
        layer.merge(safe_merge=True)
    assert not base.weight.is_inference()
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert close(x.grad, base.weight.detach().sum(0).expand(2, IN))


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


def test_the_original_takes_no_extra_memory_on_the_cpu():
    base = make_layer()
    storage = base.weight.data_ptr()
    layer = adapt(base, {"a": "bat-col"})
    layer.merge()
    assert layer._original_weight.data_ptr() == storage
    layer.unmerge()
    assert base.weight.data_ptr() == storage
    assert layer._original_weight is None


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
        assert torch.equal(got, want)


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


def test_unmerging_an_unmerged_layer_warns():
    with pytest.warns(UserWarning, match="Already unmerged"):
        adapt(make_layer(), {"a": "bone"}).unmerge()
