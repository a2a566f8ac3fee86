"""Convolutions with adapters: equal to the oracle on the unfolded weight, and to a linear layer where 1 x 1."""

import copy

import pytest
import torch
from peft import BoneConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers import ViTConfig, ViTModel

from flashbone.errors import ConfigError, NonFiniteError, ShapeError
from flashbone.merge import merge_checkpoint
from flashbone.tuner.layers.conv import BoneConv
from flashbone.tuner.layers.layer import BoneLinear
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.layers import adapted, check_lifecycle, gradients, oracle_weight
from helpers.mlp import fill_blocks

CONVS = {
    "3x3": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "3x3, strided, dilated, circular": lambda: nn.Conv2d(
        4, 6, 3, stride=2, padding=2, dilation=2, padding_mode="circular"
    ),
    "3x2, grouped, no bias": lambda: nn.Conv2d(6, 4, (3, 2), groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding="same", groups=6),
    "1x1": lambda: nn.Conv2d(5, 7, 1),
    "1x1, strided": lambda: nn.Conv2d(6, 4, 1, stride=(2, 1), bias=False),
    "1x1, padded": lambda: nn.Conv2d(6, 4, 1, padding=1),
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2),
    "1d, 1": lambda: nn.Conv1d(5, 6, 1, padding="same"),
    "3d": lambda: nn.Conv3d(2, 4, 2),
}


def inputs(conv: nn.Module, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, conv.in_channels, *[6] * (conv.weight.ndim - 2)).to(dtype).requires_grad_(True)


def layer(conv: nn.Module, variant: str = "bone", r: int = 3, **fields) -> BoneConv:
    made = BoneConv(conv, "x", r=r, variant=variant, mini_r=2, **fields)
    fill_blocks(made)
    return made.requires_grad_(True)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("name", CONVS)
def test_output_and_gradients_are_those_of_the_unfolded_weight(name, variant):
    conv = CONVS[name]().double().requires_grad_(False)
    made, x = layer(copy.deepcopy(conv), variant).double(), inputs(conv)
    made.base_layer.requires_grad_(False)
    made.set_scale("x", -0.7)
    block = made.bone_block["x"]
    want_block = block.detach().clone().requires_grad_(True)
    want_W = oracle_weight(conv.weight.flatten(1), variant, want_block, -0.7).view(conv.weight.shape)
    want, got = conv._conv_forward(x, want_W, conv.bias), made(x)
    assert got.is_contiguous()
    assert close(got, want)
    for g, w in zip(gradients(got, [x, block]), gradients(want, [x, want_block]), strict=True):
        assert close(g, w)
    delta = made.get_delta_weight("x")
    assert delta.shape == conv.weight.shape
    assert close(delta, (want_W - conv.weight).detach())


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_1x1_convolution_is_the_linear_layer_bit_for_bit(variant, stride):
    conv = nn.Conv2d(6, 8, 1, stride=stride).requires_grad_(False)
    twin = nn.Linear(6, 8).requires_grad_(False)
    twin.weight.data, twin.bias.data = conv.weight.flatten(1).clone(), conv.bias.clone()
    made, x = layer(conv, variant), inputs(conv, torch.float32)
    linear = BoneLinear(twin, "x", r=3, variant=variant, mini_r=2)
    linear.bone_block["x"].data = made.bone_block["x"].detach().clone()
    rows = x[:, :, ::stride, ::stride].movedim(1, -1)
    assert same_bits(made(x).movedim(1, -1), linear(rows), Promise.SAME_PRODUCT)
    assert close(made(x[0]), made(x)[0])  # without a batch
    wide = x.detach().to(memory_format=torch.channels_last)
    assert made(wide).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["3x3", "3x2, grouped, no bias", "1x1, strided", "1d"])
def test_mixed_adapters_live_as_on_a_linear_layer(name, tmp_path):
    conv = nn.ModuleDict({"conv": CONVS[name]()}).double()
    x = inputs(conv["conv"]).detach()
    for pair in (("bone", "bat-col"), ("orthogonal", "mini"), ("bat-row", "bone")):
        model = adapted(copy.deepcopy(conv), *pair, target_modules=["conv"])
        check_lifecycle(
            model,
            lambda m: (m.base_model.model if hasattr(m, "base_model") else m)["conv"](x).detach(),
            lambda: copy.deepcopy(conv),
            tmp_path / "-".join(pair),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_half_precision_is_right_and_overflows_nowhere(variant, dtype):
    conv = nn.Conv2d(64, 8, 3).to(dtype).requires_grad_(False)
    made, x = layer(conv, variant, r=4), inputs(conv, dtype).detach()
    x = x.abs() * 3000 if variant == "bone" and dtype == torch.float16 else x  # a sum of 144 shards leaves the range
    made.bone_block["x"].data *= 1e-3
    weight = oracle_weight(conv.weight.flatten(1), variant, made.bone_block["x"].detach()).view(conv.weight.shape)
    want = nn.functional.conv2d(x.double(), weight, conv.bias.double())
    got = made(x)
    assert got.dtype == dtype
    assert close(got, want)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("name", ["3x3", "1x1"])
def test_dropout_acts_on_what_the_adapter_sees_and_never_on_the_base(name, variant):
    conv = CONVS[name]().double()
    made, x = layer(conv, variant, dropout=0.5).double(), inputs(conv).detach()
    torch.manual_seed(3)
    got = made(x)
    torch.manual_seed(3)
    seen = made.bone_dropout["x"](x.movedim(1, -1)).movedim(-1, 1) if name == "1x1" else made.bone_dropout["x"](x)
    want = conv(x) + conv._conv_forward(seen, made.get_delta_weight("x"), None)
    assert close(got, want)
    assert close(made.eval()(x), conv._conv_forward(x, conv.weight + made.get_delta_weight("x"), conv.bias))


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own, as image models have."""

    def forward(self, x):
        W = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, W, self.bias)


@pytest.mark.parametrize("variant", ["bone", "bat-col"])
def test_forwards_of_their_own_hooks_and_parametrisations_are_honoured(variant):
    conv = Standardised(4, 6, 3).double()
    made, x = layer(conv, variant).double(), inputs(conv).detach()
    merged = copy.deepcopy(made)
    merged.merge()
    assert close(made(x), merged(x))
    hooked = layer(CONVS["1x1"]().double(), variant).double()
    x = inputs(hooked.base_layer).detach()
    want = hooked(x)
    hooked.base_layer.register_forward_hook(lambda module, args, y: y + 1)
    assert close(hooked(x), want + 1)
    normed = layer(parametrizations.weight_norm(nn.Conv2d(4, 6, 3)).double(), variant).double()
    x = inputs(normed.base_layer).detach()
    want = normed.base_layer._conv_forward(
        x, normed.base_layer.weight + normed.get_delta_weight("x"), normed.base_layer.bias
    )
    assert close(normed(x), want)
    with pytest.raises(ConfigError, match="computed by a parametrisation"):
        normed.merge()


def test_what_convolutions_cannot_have_is_refused_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm = nn.ConvTranspose2d(4, 4, 2), Standardised(4, 6, 3)
            self.conv, self.rnn = nn.Conv2d(2, 6, 1), nn.LSTM(4, 4)

    for fields, message in [
        (
            {"target_modules": ["up"]},
            "up: target module cannot be adapted, it is a ConvTranspose2d, and of convolution",
        ),
        ({"target_modules": ["rnn"]}, "rnn: target module cannot be adapted, it is a LSTM, whose weights no variant"),
        ({"target_modules": ["norm"], "dropout": 0.1}, "norm: Standardised has a forward of its own.*dropout=0.1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            get_peft_model(Model(), BoneConfig(r=2, **fields))
    with pytest.raises(ShapeError, match=r"conv: a bottleneck of 4 is larger than the 2 input features"):
        get_peft_model(Model(), BoneConfig(bottleneck_size=4, target_modules=["conv"]))


def test_a_safe_merge_that_fails_changes_no_weight():
    made = layer(nn.Conv2d(2, 4, 3))
    made.bone_block["x"].data[0, 0] = torch.nan
    before = made.base_layer.weight.clone()
    with pytest.raises(NonFiniteError):
        made.merge(safe_merge=True)
    assert same_bits(made.base_layer.weight, before, Promise.UNTOUCHED)
    assert "bone r=3" in repr(made)


@pytest.mark.parametrize("name", ["3x3", "1x1"])
def test_rows_of_a_batch_take_their_own_adapters(name):
    conv = nn.ModuleDict({"conv": CONVS[name]()}).double()
    x = inputs(conv["conv"]).detach()
    model = adapted(conv, "bone", "bat-row", target_modules=["conv"]).eval().base_model
    made = model.model["conv"]
    want = []
    for row, name in enumerate(["y", "x"]):
        model.set_adapter(name)
        want.append(made(x[row : row + 1]))
    with model._enable_peft_forward_hooks(adapter_names=["y", "x", "__base__"]):
        got = made(torch.cat([x, x[:1]]))
    assert close(got, torch.cat([*want, made.base_layer(x[:1])]))


def test_sums_of_adapters_are_exact():
    conv = nn.ModuleDict({"conv": CONVS["3x3"]()}).double()
    x = inputs(conv["conv"]).detach()
    model = adapted(conv, "bone", "mini", target_modules=["conv"])
    made = model.base_model.model["conv"]
    want = made(x)
    model.base_model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert close(made(x), want)


def test_files_merge_into_a_checkpoint_bit_for_bit(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    base = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes), add_pooling_layer=False)
    base.save_pretrained(tmp_path / "base")
    for variant in ("bone", "bat-col"):
        model = adapted(copy.deepcopy(base), variant, target_modules=["projection"])
        model.save_pretrained(tmp_path / variant, selected_adapters=["x"])
        report = merge_checkpoint(tmp_path / "base", tmp_path / variant / "x", tmp_path / f"{variant} merged")
        merged = ViTModel.from_pretrained(tmp_path / f"{variant} merged", add_pooling_layer=False).state_dict()
        assert report.merged == 1
        live = model.merge_and_unload().state_dict()
        assert all(same_bits(merged[name], live[name], Promise.SAME_PRODUCT) for name in live)
