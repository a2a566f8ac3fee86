"""Parameters that cannot be trained whole, each refused in one line; and those that can beside them."""

import pytest
from decay_models import DECAYS, WIDTH, assert_unchanged, base, by_hand, config, fill, inputs, snapshot, trained
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from flashbone import BoneConfig
from flashbone.errors import ConfigError, FlashboneError
from helpers.comparison import Promise, close, same_bits

REFUSED = [
    ({"names": ["time_dekay"]}, r"the model has no parameter 'time_dekay'; it has att.time_decay, "),
    ({"names": ["decay"]}, "the model has no parameter 'decay'"),
    ({"names": ["key.weight"]}, r"key\.weight.*: it (is kept whole .*0\.att\.key is adapted|belongs to a layer)"),
    ({"names": ["key.bias"], "bias": "bone_only"}, r"key\.bias.*: it (is kept whole .* is adapted|belongs to a layer)"),
    ({"names": ["ln_x.bias"], "bias": "all"}, "ln_x.bias .and 1 more.: it is trained by bias='all' already"),
    ({"names": ["ln_x.weight"], "modules_to_save": ["ln_x"]}, "part of a module that is trained as a whole"),
    ({"names": ["time_decay"], "modules_to_save": ["blocks.1.att"], "target_modules": ["0.att.key"]}, "as a whole"),
    ({"names": ["time_maa_w2"], "target_modules": None, "target_parameters": ["time_maa_w2"]}, "target_parameters"),
    ({"names": ["steps"]}, "steps: it is torch.int64, and a plain parameter of floating-point numbers was wanted"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_kept_is_one_clear_line_and_leaves_no_trace(fields, message):
    fields = dict(fields)
    settings = config(*fields.pop("names"), **fields)
    bare = base()
    before, objects = snapshot(bare), dict(bare.named_parameters())
    with pytest.raises(ConfigError, match=message) as raised:
        get_peft_model(bare, settings)
    assert "\n" not in str(raised.value)
    assert_unchanged(bare, before)
    assert all(bare.get_parameter(name) is parameter for name, parameter in objects.items())
    model = trained("scale", adapter="first")
    before, want = snapshot(model), model(inputs())
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("second", settings)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["first"]
    assert same_bits(model(inputs()), want, Promise.SAME_PRODUCT)


def test_a_tied_parameter_is_refused_with_its_other_name():
    bare = base()
    bare.blocks[1].att.time_decay = bare.blocks[0].att.time_decay
    with pytest.raises(ConfigError, match=r"0\.att\.time_decay: it is also blocks\.1\.att\.time_decay.*untie them"):
        get_peft_model(bare, config("time_decay"))


def test_a_weight_held_in_a_second_place_is_refused():
    model = nn.ModuleDict({"rnn": nn.LSTM(WIDTH, WIDTH), "key": nn.Linear(WIDTH, WIDTH)})
    with pytest.raises(ConfigError, match=r"rnn.weight_hh_l0: a LSTM holds its weights in a second place"):
        get_peft_model(model, config("weight_hh_l0", target_modules=["key"]))


def test_a_parameter_of_a_layer_that_is_not_adapted_may_be_kept():
    model = trained("key.weight", "key.bias", "ln_x.weight", target_modules=["output"])
    assert close(model(inputs()), by_hand(model)(inputs()))
    before = model(inputs())
    assert close(model.merge_and_unload()(inputs()), before)


def test_other_parameters_of_a_module_may_be_adapted(tmp_path):
    fields = {"target_modules": ["key"], "target_parameters": ["time_maa_w2"]}
    model = trained("time_decay", **fields)
    want = model(inputs())
    model.save_pretrained(tmp_path)
    assert f"base_model.model.{DECAYS[0]}" in load_file(tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert same_bits(again(inputs()), want, Promise.SAME_PRODUCT)
    again.add_adapter("second", config("time_decay", **fields))
    fill(again, "second", 4)
    assert same_bits(again(inputs()), want, Promise.SAME_PRODUCT)
    again.set_adapter("second")
    assert not close(again(inputs()), want)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        again.delete_adapter("second")
    assert same_bits(again(inputs()), want, Promise.SAME_PRODUCT)
    assert close(model.merge_and_unload()(inputs()), want)


def test_the_config_wants_a_list_of_names():
    for wrong in ("time_decay", [3], [""]):
        with pytest.raises(ConfigError, match=r"parameters_to_save: got .* wanted a list of names"):
            BoneConfig(parameters_to_save=wrong)


def test_a_module_whose_class_somebody_changed_is_refused_by_name():
    model = trained("time_decay")
    attention = model.base_model.model.blocks[0].att
    nn.utils.parametrize.register_parametrization(attention, "time_maa_x", nn.Identity())
    before = model(inputs())
    for change in (model.unload, lambda: model.add_adapter("second", config())):
        with pytest.raises(
            FlashboneError, match=r"blocks.0.att.time_decay: it is kept .* its module became Parametrized"
        ):
            change()
    assert same_bits(model(inputs()), before, Promise.SAME_PRODUCT)
