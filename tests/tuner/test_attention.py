"""nn.MultiheadAttention and the transformer layers of torch, whose weights are read and never called."""

import copy

import pytest
import torch
from peft import BoneConfig, PeftModel, convert_to_lora, get_peft_model
from torch import nn

from flashbone.errors import ConfigError
from flashbone.tuner.layers.calls import CURRENT, Gate, one_call
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.layers import adapted, check_lifecycle, gradients, oracle_weight

BOTH = {"target_modules": ["out_proj"], "target_parameters": ["self_attn.in_proj_weight"]}


class Model(nn.Module):
    def __init__(self, **fields) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(6, 2, batch_first=True, **fields)
        self.own = fields

    def forward(self, x):
        return self.self_attn(x, *([x[..., :5]] * 2 if self.own else [x, x]), need_weights=False)[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).double().eval()


def inputs() -> torch.Tensor:
    return torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("train", [False, True])
def test_output_and_gradients_are_those_of_the_shifted_projections(variant, train):
    base, x = Model().double().train(train), inputs().requires_grad_(True)
    model = adapted(copy.deepcopy(base), variant, **BOTH).train(train)
    blocks = [p for p in model.parameters() if p.requires_grad]
    wanted = [block.detach().clone().requires_grad_(True) for block in blocks]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2
    assert "out_proj" in names[0]
    values = {
        "self_attn.out_proj.weight": oracle_weight(base.self_attn.out_proj.weight, variant, wanted[0]),
        "self_attn.in_proj_weight": oracle_weight(base.self_attn.in_proj_weight, variant, wanted[1]),
    }
    got, want = model(x), torch.func.functional_call(base, values, (x,))
    assert close(got, want)
    for g, w in zip(gradients(got, [x, *blocks]), gradients(want, [x, *wanted]), strict=True):
        assert close(g, w)
    with torch.no_grad():  # the fast path
        assert close(model(x), want)
        assert close(model(x), want)


@pytest.mark.parametrize("fields", [{"target_modules": ["out_proj"]}, BOTH])
def test_mixed_adapters_live_as_on_a_linear_layer(fields, tmp_path):
    base = encoder()
    check_lifecycle(
        adapted(copy.deepcopy(base), "bone", "bat-col", **fields).eval(),
        lambda m: m.eval()(inputs()).detach(),
        lambda: copy.deepcopy(base),
        tmp_path,
    )


@pytest.mark.parametrize("fields", [{"target_modules": ["out_proj"]}, BOTH])
def test_the_fast_path_of_an_encoder_sees_the_adapters(fields):
    model = adapted(encoder(), "bone", **fields).eval()
    assert len([p for p in model.parameters() if p.requires_grad]) == 2 * len(fields)
    slow = model(inputs().requires_grad_(True))
    with torch.no_grad():
        assert close(model(inputs()), slow)
        assert not close(model.base_model.model.train()(inputs()) * 0, slow)
    slow.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_separate_projections_of_queries_keys_and_values():
    fields = {"target_parameters": ["q_proj_weight", "k_proj_weight", "v_proj_weight"]}
    model = adapted(Model(kdim=5, vdim=5).double(), "bone", "bat-row", **fields)
    want = model(inputs())
    assert len([p for p in model.parameters() if p.requires_grad]) == 6
    assert close(model.merge_and_unload()(inputs()), want)


def test_a_second_adapter_reaches_layers_inside_an_adapted_module(tmp_path):
    model = get_peft_model(Model().double(), BoneConfig(r=2, target_parameters=["in_proj_weight"]), "first")
    model.add_adapter("second", BoneConfig(r=3, variant="bat-row", target_modules=["out_proj"], init_weights=False))
    model.set_adapter("second")
    got = model(inputs())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Model().double(), tmp_path / "second")
    again.base_model.model.load_state_dict(model.base_model.model.state_dict(), strict=False)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.self_attn.base_layer.out_proj.bone_block.second"
    ]
    assert set(again.state_dict()) >= {"base_model.model.self_attn.out_proj.bone_block.default"}
    bare = model.merge_and_unload()
    assert isinstance(bare.self_attn, nn.MultiheadAttention)
    assert type(bare.self_attn.out_proj).__module__[:5] == "torch"
    assert close(bare(inputs()), got)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ["self_attn"]},
            "it is a MultiheadAttention; name its out_proj instead, and its in_proj_w",
        ),
        (
            {"target_modules": ["out_proj"], "dropout": 0.1},
            "self_attn.out_proj: MultiheadAttention reads the weight",
        ),
        ({"target_parameters": ["in_proj_weight"], "dropout": 0.1}, "dropout=0.1 cannot be applied to target_p"),
        (
            {"target_parameters": ["in_proj_bias"]},
            "no matrix or stack of matrices 'in_proj_bias'; it has self_attn.in_p",
        ),
        (
            {"target_parameters": ["out_proj.weight"]},
            "is the weight of a NonDynamicallyQuantizableLinear, which target_",
        ),
    ],
)
def test_what_attention_cannot_have_is_refused_by_name(fields, message):
    model = Model()
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, BoneConfig(r=2, **fields))
    assert type(model.self_attn) is nn.MultiheadAttention
    assert all(p.requires_grad for p in model.parameters())


def test_layers_that_peft_cannot_convert_to_lora_say_so():
    model = adapted(Model(), "bone", **BOTH)
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*BoneLinear"):
        convert_to_lora(model, rank=3, adapter_name="x")


def test_rows_with_adapters_of_their_own_are_refused():
    model = adapted(Model().double(), "bone", target_modules=["out_proj"]).eval()
    with pytest.raises(ConfigError, match="BoneLinear shifts one weight for all rows of a batch"):
        model(inputs(), adapter_names=["x", "__base__"])
    with model.disable_adapter():
        want = model(inputs())
    assert close(model(inputs(), adapter_names=["__base__"] * 2), want)


def test_what_the_shifted_weight_is_made_from_is_seen_at_every_call():
    model = adapted(Model().double(), "bone", target_modules=["out_proj"]).eval()
    out_proj = model.base_model.model.self_attn.out_proj
    with torch.no_grad():
        model(inputs())  # the watched call, which torch keeps off its fast path
        first = model(inputs())
        assert same_bits(model(inputs()), first, Promise.SAME_PRODUCT)
        out_proj.bone_block["x"].mul_(2)
        second = model(inputs())
        assert not close(second, first)
        out_proj.set_scale("x", 0.5)
        assert close(model(inputs()), first)
    assert close(out_proj.weight, out_proj.base_layer.weight + out_proj.get_delta_weight("x"))


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_inference_keeps_no_shifted_weight(variant):
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 2, batch_first=True)})
    config = BoneConfig(r=4, variant=variant, mini_r=2, target_modules=["attention.out_proj"], init_weights=False)
    model = get_peft_model(attention, config).eval().base_model.model["attention"]
    x = torch.randn(2, 3, 12)
    with torch.no_grad(), one_call(Gate()):
        model(x, x, x)
        assert not any(kept.values for kept in CURRENT.kept.values())
