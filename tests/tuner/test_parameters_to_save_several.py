"""Parameters that are trained whole, in models with several adapters, or with another method's."""

import pytest
import torch
from decay_models import (
    DECAYS,
    Attention,
    assert_unchanged,
    base,
    by_hand,
    config,
    fill,
    inputs,
    snapshot,
    trained,
    values,
)
from peft import LoraConfig, inject_adapter_in_model

from flashbone.errors import ConfigError
from flashbone.tuner.layers.layer import bone_layers
from flashbone.tuner.model.saved_parameters import find
from helpers.comparison import Promise, close, same_bits


def test_adapters_switch_their_values_and_others_see_the_base():
    model = trained("time_decay", adapter="x1")
    model.add_adapter("x2", config("time_decay", "scale"))
    model.add_adapter("plain", config())
    fill(model, "x2", 2)
    fill(model, "plain", 3)
    for name in ("x1", "x2", "plain"):
        model.set_adapter(name)
        held = {saved.name: saved.bone_parameter for saved in find(model)}
        for key, adapters in held.items():
            want = adapters[name] if name in adapters else base().get_parameter(key)
            decay = model.base_model.model.get_submodule("blocks.0.att").decay()
            assert same_bits(decay, _decay(model, name), Promise.SAME_PRODUCT)
            got = model.base_model.model
            for part in key.split("."):
                got = getattr(got, part)
            assert same_bits(got, want, Promise.STORED)
    assert same_bits(trained("time_decay", adapter="x1")(inputs()), _with(model, "x1"), Promise.SAME_PRODUCT)
    model.base_model.set_adapter(["x2", "plain"])  # one of them has values: both act
    alone = by_hand(model, "plain")
    assert not close(model(inputs()), alone(inputs()))


def _decay(model, name):
    value = find(model)[0].bone_parameter
    value = value[name] if name in value else base().get_parameter(DECAYS[0])
    return torch.exp(-torch.exp(value))


def _with(model, name):
    model.set_adapter(name)
    return model(inputs())


def test_deleting_an_adapter_makes_its_parameters_plain_again():
    model = trained("time_decay", adapter="x1")
    model.add_adapter("x2", config("scale"))
    model.add_adapter("x3", config("time_decay"))
    model.delete_adapter("x2")
    assert [saved.name for saved in find(model)] == DECAYS
    with pytest.warns(UserWarning, match="Setting active adapter to x3"):
        model.delete_adapter("x1")
    assert model.active_adapter == "x3"
    assert find(model)[0].active_adapters == ["x3"]
    assert find(model)[0].bone_parameter["x3"].requires_grad
    model.delete_adapter("x3")
    assert not find(model)
    assert type(model.base_model.model.blocks[0].att) is Attention


def test_a_deleted_adapter_leaves_values_and_layers_at_the_same_next_one():
    model = trained(adapter="x1")
    model.add_adapter("x2", config())
    model.add_adapter("x3", config("time_decay"))
    with pytest.warns(UserWarning, match="Setting active adapter to x2"):
        model.delete_adapter("x1")
    assert model.active_adapter == "x2"
    got = model.base_model.model.blocks[0].att.time_decay
    assert same_bits(got, base().blocks[0].att.time_decay, Promise.UNTOUCHED)


def test_two_adapters_with_a_value_for_one_parameter_are_not_active_together():
    model = trained("time_decay", adapter="x1")
    model.add_adapter("x2", config("time_decay"))
    line = "adapters 'x1' and 'x2' each have a value of their own for blocks.0.att.time_decay .*; use one of them"
    with pytest.raises(ConfigError, match=line):
        model.base_model.set_adapter(["x1", "x2"])
    assert model.base_model.active_adapters == ["x1"]
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=line):
            merge(adapter_names=["x1", "x2"])
    assert_unchanged(model, before)
    hosted = inject_adapter_in_model(config("scale"), base(), "x1")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        hosted = inject_adapter_in_model(config("scale"), hosted, "x2")
    for saved in find(hosted):
        saved.set_adapter(["x1", "x2"])  # as hosts do, one by one
    with pytest.raises(ConfigError, match="'x1' and 'x2' each have a value of their own for scale"):
        hosted(inputs())


def test_a_batch_of_adapters_refuses_those_with_values_and_gives_others_the_base():
    model = trained("time_decay", adapter="x1").eval()
    model.add_adapter("plain", config())
    fill(model, "plain", 3)
    rows = torch.cat([inputs(), inputs()])
    mixed = model(rows, adapter_names=["plain", "plain", "__base__", "__base__"])
    assert close(mixed[:2], by_hand_without_values(model, "plain")(inputs()))
    assert close(mixed[2:], base()(inputs()))
    with pytest.raises(
        ConfigError, match=r"adapter 'x1' has a value of its own for blocks.0.att.time_decay .* set_adapter"
    ):
        model(rows, adapter_names=["plain", "plain", "x1", "x1"])
    assert same_bits(model(inputs()), trained("time_decay", adapter="x1").eval()(inputs()), Promise.SAME_PRODUCT)


def by_hand_without_values(model, adapter):
    bare = base()
    with torch.no_grad():
        for name, layer in bone_layers(model.base_model.model):
            bare.get_submodule(name).weight += layer.get_delta_weight(adapter)
    return bare


def test_there_is_no_lora_and_no_weighted_sum_of_such_an_adapter():
    model = trained("time_decay", adapter="x1")
    model.add_adapter("x2", config())
    with pytest.raises(ConfigError, match=r"a plain LoRA has no place for blocks\.0\.att\.time_decay, blocks\.1"):
        model.to_lora("x1")
    with pytest.raises(ConfigError, match=r"\['x1'\] train modules, parameters or biases as a whole"):
        model.add_weighted_adapter(["x1", "x2"], [0.5, 0.5], "sum")
    assert not model.base_model.supports_lora_conversion()


LATER = [
    ({"target_modules": ["ln_x", "key"]}, "ln_x"),
    ({"target_modules": None, "target_parameters": ["time_maa_w2"]}, "time_maa_w2: it is kept whole"),
    ({"modules_to_save": ["ln_x"], "target_modules": ["key"]}, "ln_x.bias is kept by an adapter .* trained as a whole"),
    ({"bias": "all", "target_modules": ["key"]}, "ln_x.bias is kept by an adapter .* bias='all' would train it"),
    ({"target_modules": ["output"]}, "output.weight: it is kept whole .* and blocks.0.att.output is adapted"),
]


@pytest.mark.parametrize(("fields", "message"), LATER)
def test_a_later_adapter_leaves_alone_what_another_keeps(fields, message):
    model = trained("time_maa_w2", "ln_x.bias", "output.weight", target_modules=["key"], adapter="first")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("second", config(**fields))
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["first"]


def test_trls_reference_starts_as_a_copy_of_the_values():
    model = trained("time_decay")
    model.add_adapter("ref", model.peft_config["default"])
    assert all(same_bits(values(model, "ref")[name], value, Promise.STORED) for name, value in values(model).items())


def test_a_lora_beside_it_is_not_disturbed():
    model = inject_adapter_in_model(config("time_decay", "scale"), base(), "bone")
    fill(model, "bone")
    want = model(inputs())
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["output"]), model, "lora")
    for module in model.modules():
        if hasattr(module, "set_adapter"):
            module.set_adapter(["bone", "lora"])
    assert close(model(inputs()), want)  # LoRA's B starts at zero
