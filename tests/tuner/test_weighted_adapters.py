"""Weighted sums of adapters: exact, over layers that differ, in files, and refused where there is none."""

import pytest
import torch
from adapted_models import SIZES, adapted, assert_unchanged, config, inputs, snapshot
from peft import PeftModel, get_peft_model
from torch import nn

from flashbone.errors import ConfigError
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import MLP, fill_blocks

# ---- weighted sums


@pytest.mark.parametrize(
    "kinds", [*((v, v) for v in VARIANT_NAMES if v != "orthogonal"), ("bone", "mini"), ("bone", "bone", "mini")]
)
def test_weighted_adapters_are_exact_sums(kinds):
    model = get_peft_model(MLP(SIZES), config(kinds[0]), adapter_name="0")
    for i, variant in enumerate(kinds[1:], 1):
        r = 4 if variant.startswith("bat") else 4 - i
        model.add_adapter(str(i), config(variant, r=r))
    fill_blocks(model)
    model.base_model.set_scale("0", 0.5)
    names, weights = [str(i) for i in range(len(kinds))], [0.7, -1.3, 0.4][: len(kinds)]
    model.add_weighted_adapter(names, weights, "sum")
    assert model.active_adapter == "0"
    for layer in (model.base_model.model.lin0, model.base_model.model.lin1):
        want = sum(w * layer.get_delta_weight(n) for n, w in zip(names, weights, strict=True))
        assert close(layer.get_delta_weight("sum"), want)
    model.set_adapter("sum")
    got = model(inputs())
    for name, weight in zip(names, weights, strict=True):
        model.base_model.set_scale(name, weight * (0.5 if name == "0" else 1))
    model.base_model.set_adapter(names)
    assert close(got, model(inputs()))


def test_weighted_adapters_of_other_layers_and_their_files(tmp_path):
    model = get_peft_model(MLP(SIZES), config(target_modules=["lin0"]), adapter_name="0")
    model.add_adapter("1", config(r=3, target_modules=["lin0", "lin1"], rank_pattern={"lin1": 2}))
    fill_blocks(model)
    model.add_weighted_adapter(["0", "1"], [1.0, 2.0], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(MLP(SIZES), tmp_path / "sum")
    assert same_bits(again(inputs()), model(inputs()), Promise.SAME_PRODUCT)
    assert again.base_model.model.lin0.bone_r == {"default": 12}


@pytest.mark.parametrize(
    ("kinds", "arguments", "message"),
    [
        (
            ("bat-col", "bat-col"),
            (["0", "1"], [1, 1], "s"),
            r"lin0: '0' is bat-col with r=4, '1' is bat-col with r=3; no",
        ),
        (
            ("orthogonal",) * 2,
            (["0", "1"], [1, 1], "s"),
            "'0' is orthogonal with r=4, .*; no single adapter is their sum",
        ),
        (("bone", "bat-row"), (["0", "1"], [1, 1], "s"), "no single adapter is their sum; activate them together"),
        (("bone", "bone"), (["0", "9"], [1, 1], "s"), r"adapters: no \['9'\] in this model, which has \['0', '1'\]"),
        (("bone", "bone"), (["0", "1"], [1], "s"), "weights: got 1 for 2 adapters"),
        (("bone", "bone"), (["0", "1"], [1, 1], "1"), "adapter_name: '1' exists already"),
        (("bone", "bone"), (["0", "1"], [1, 1], "s", "svd"), "combination_type: got 'svd', wanted 'linear'"),
        (("bone", "bone"), ([], [], "s"), "wanted one or more different names"),
    ],
)
def test_weighted_sums_that_do_not_exist_are_refused_and_change_nothing(kinds, arguments, message):
    model = adapted(*kinds)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(*arguments)
    assert_unchanged(model, before)
    assert set(model.peft_config) == {"0", "1"}


def test_sums_over_different_layers_take_one_variant_or_are_refused(tmp_path):
    model = get_peft_model(MLP((8, 8, 8)), config("bat-row", target_modules=["lin0"]), adapter_name="0")
    model.add_adapter("1", config("bat-col", target_modules=["lin1"]))
    with pytest.raises(ConfigError, match=r"more than one variant.*\(lin0 is bat-row; lin1 is bat-col\)"):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "s")
    model = get_peft_model(MLP((8, 8, 8)), config("mini", target_modules=["lin0"]), adapter_name="0")
    model.add_adapter("1", config("mini", mini_r=3, target_modules=["lin1"]))
    fill_blocks(model)
    model.add_weighted_adapter(["0", "1"], [1.0, 2.0], "s")
    model.base_model.set_adapter(["0", "1"])
    model.base_model.set_scale("1", 2.0)
    want = model(inputs()[:, :8])
    model.set_adapter("s")
    assert close(model(inputs()[:, :8]), want)
    model.save_pretrained(tmp_path, selected_adapters=["s"])
    again = PeftModel.from_pretrained(MLP((8, 8, 8)), tmp_path / "s")
    assert close(again(inputs()[:, :8]), want)


class Nested(nn.Module):
    """Two layers of which one's name ends in the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.sub = nn.Linear(12, 12), nn.ModuleDict({"lin0": nn.Linear(12, 12)})
        for i, parameter in enumerate(self.parameters()):
            parameter.data.copy_(torch.linspace(-1, 1 + i, parameter.numel()).view(parameter.shape))

    def forward(self, x):
        return self.sub["lin0"](torch.tanh(self.lin0(x)))


@pytest.mark.parametrize("both", [True, False])
def test_sums_are_saved_for_exactly_the_layers_that_they_cover(both, tmp_path):
    exact = {"rank_pattern": {r"\Alin0": 3}} if both else {}
    model = get_peft_model(Nested(), config(target_modules="lin0|sub.lin0" if both else "lin0", **exact))
    fill_blocks(model)
    model.add_weighted_adapter(["default"], [0.5], "s")
    model.set_adapter("s")
    x = torch.linspace(-1, 1, 24).view(2, 12)
    model.save_pretrained(tmp_path, selected_adapters=["s"])
    again = PeftModel.from_pretrained(Nested(), tmp_path / "s")
    assert same_bits(again(x), model(x), Promise.SAME_PRODUCT)
    assert set(again.base_model.targeted_module_names) == ({"lin0", "sub.lin0"} if both else {"lin0"})
