"""Parameters that are trained whole: values in their places, gradients, precision, merging and unloading."""

import copy
import pickle

import pytest
import torch
from decay_models import DECAYS, Attention, Model, base, by_hand, config, fill, inputs, snapshot, trained, values
from peft import get_peft_model

from flashbone.errors import NonFiniteError
from flashbone.tuner.model.saved_parameters import SavedParameter, find
from helpers.comparison import Promise, close, same_bits


def test_the_adapters_value_takes_the_parameters_place_and_starts_as_the_bases():
    bare = base()
    want = bare(inputs())
    model = get_peft_model(base(), config("time_decay", "att.time_maa_x", "scale"))
    assert close(model(inputs()), want)  # an adapted layer takes its tokens as the rows of one matrix
    assert model.peft_config["default"].parameters_to_save == [
        *("scale", "blocks.0.att.time_maa_x", "blocks.0.att.time_decay"),
        *("blocks.1.att.time_maa_x", "blocks.1.att.time_decay"),
    ]
    fill(model)
    assert not close(model(inputs()), want)
    assert close(model(inputs()), by_hand(model)(inputs()))
    attention = model.base_model.model.blocks[0].att
    decay = torch.exp(-torch.exp(values(model)[DECAYS[0]]))
    assert same_bits(attention.decay(), decay, Promise.SAME_PRODUCT)  # outside of forward, too
    with model.disable_adapter():
        assert same_bits(model(inputs()), want, Promise.SAME_PRODUCT)
    assert type(attention).__name__ == "Attention"
    assert isinstance(attention, Attention)


def test_gradients_are_those_of_the_parameter_and_the_base_gets_none():
    model = trained("time_decay", "scale")
    hand = by_hand(model)
    for each in (model, hand):
        each(inputs()).square().sum().backward()
    for saved in find(model):
        assert close(saved.bone_parameter["default"].grad, hand.get_parameter(saved.name).grad)
        assert saved.base_layer.original.grad is None
        assert not saved.base_layer.original.requires_grad
    trains = {name.rpartition(".bone_")[0].rpartition(".")[2] for name in snapshot(model)[1]}
    assert trains == {"key", "output", "saved_parameter_time_decay", "saved_parameter_scale"}


def test_gradient_checkpointing_gives_the_same_gradients():
    model = trained("time_decay")
    model(inputs()).sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.base_model.model.checkpoints = True
    model(inputs()).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    assert all(same_bits(got[name], want[name], Promise.SAME_PRODUCT) for name in want)


@pytest.mark.slow
def test_what_reads_such_a_parameter_is_compiled_as_one_graph():
    model = trained("time_decay", "time_maa_x", adapter="x1")
    model.add_adapter("x2", config("time_decay"))
    fill(model, "x2", 2)
    attention = model.base_model.model.blocks[0].att

    def read(x):
        return x.roll(1, -1) * attention.time_maa_x + attention.decay()

    torch._dynamo.reset()
    compiled = torch.compile(read, backend="aot_eager", fullgraph=True)
    for change in (lambda: fill(model, "x1", 5), lambda: model.set_adapter("x2"), lambda: model.set_adapter("x1")):
        assert close(compiled(inputs()), read(inputs()))
        change()
    compiled(inputs()).sum().backward()
    assert all(saved.bone_parameter["x1"].grad is not None for saved in find(model)[:2])


def test_values_are_kept_in_fp32_and_used_in_the_bases_dtype():
    model = trained("time_decay", "scale", dtype=torch.bfloat16)
    assert {value.dtype for value in values(model).values()} == {torch.float32}
    assert model.base_model.model.scale.dtype == torch.bfloat16
    assert same_bits(model.base_model.model.scale, values(model)["scale"].bfloat16(), Promise.EXACT)
    model(inputs(torch.bfloat16)).sum().backward()
    assert find(model)[0].bone_parameter["default"].grad.dtype == torch.float32
    low = get_peft_model(base(torch.bfloat16), config("scale"), autocast_adapter_dtype=False)
    assert values(low)["scale"].dtype == torch.bfloat16


def test_merging_gives_the_value_and_unmerging_the_base_bit_for_bit():
    model = trained("time_decay", "scale", dtype=torch.bfloat16)
    bare, x = base(torch.bfloat16), inputs(torch.bfloat16)
    model.base_model.keep_originals(False)  # a value that is gone could not be computed back
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        rounded = {name: value.bfloat16() for name, value in values(model).items()}
        assert all(same_bits(saved.base_layer.original, rounded[saved.name], Promise.EXACT) for saved in find(model))
        with torch.no_grad():
            merged = model(x)
        model.unmerge_adapter()
        originals = {saved.name: saved.base_layer.original for saved in find(model)}
        assert all(same_bits(originals[n], bare.get_parameter(n), Promise.UNTOUCHED) for n in originals)
    assert merged.shape == x.shape
    model.merge_adapter()
    with model.disable_adapter():  # takes the merge back, as layers do
        model(x)
    assert same_bits(find(model)[0].base_layer.original, bare.get_parameter(find(model)[0].name), Promise.UNTOUCHED)


def test_merge_and_unload_leaves_the_same_plain_parameters():
    bare = base()
    objects = dict(bare.named_parameters())
    order = list(bare.state_dict())
    model = get_peft_model(bare, config("time_maa_x", "time_maa_w2", "scale"))
    fill(model)
    want, merged_values = by_hand(model), values(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert list(merged.state_dict()) == order
    assert all(merged.get_parameter(name) is parameter for name, parameter in objects.items())
    assert all(same_bits(merged.get_parameter(name), value, Promise.STORED) for name, value in merged_values.items())
    assert close(merged(inputs()), want(inputs()))
    assert not any(isinstance(module, SavedParameter) for module in merged.modules())
    assert type(merged.blocks[0].att) is Attention
    assert type(merged) is Model


def test_unload_leaves_the_base():
    model, bare = trained("time_decay", "scale"), base()
    unloaded = model.unload()
    assert list(unloaded.state_dict()) == list(bare.state_dict())
    tensors = unloaded.state_dict()
    assert all(same_bits(tensors[name], want, Promise.UNTOUCHED) for name, want in bare.state_dict().items())


def test_an_unloaded_copy_leaves_the_original_as_it_is():
    model = trained("time_decay", "scale")
    want = model(inputs())
    merged = copy.deepcopy(model).merge_and_unload()
    assert close(merged(inputs()), want)
    assert same_bits(model(inputs()), want, Promise.SAME_PRODUCT)
    again = pickle.loads(pickle.dumps(model))
    assert same_bits(again(inputs()), want, Promise.SAME_PRODUCT)
    assert same_bits(copy.deepcopy(again).unload()(inputs()), base()(inputs()), Promise.SAME_PRODUCT)


def test_a_value_that_is_not_finite_is_not_merged_safely_and_nothing_changes():
    model = trained("time_decay")
    with torch.no_grad():
        find(model)[1].bone_parameter["default"][..., 0] = float("nan")
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NonFiniteError, match=r"blocks.1.att.time_decay: adapter 'default': its value holds NaN"):
            merge(safe_merge=True)
        tensors, *rest = snapshot(model)
        assert rest == list(before[1:])
        assert tensors.keys() == before[0].keys()
    assert same_bits(find(model)[0].base_layer.original, base().blocks[0].att.time_decay, Promise.UNTOUCHED)
