"""Single parameters of RWKV models that are trained whole: values, gradients, precision, merging, several adapters."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model, inject_adapter_in_model
from saved_values import (
    NAMES,
    TOKENS,
    assert_unchanged,
    bases,
    by_hand,
    config,
    fill,
    logits,
    snapshot,
    trained,
    values,
)
from torch import nn

from flashbone.errors import ConfigError, NonFiniteError
from flashbone.rwkv import from_pth
from flashbone.tuner.model.saved_parameters import SavedParameter, find
from helpers.comparison import Promise, close, same_bits
from helpers.rwkv import write_rwkv
from helpers.transformers_peft import needs_transformers_own_adapters


@pytest.fixture(scope="module", params=[6, 7], ids=lambda v: f"v{v}")
def version(request):
    return request.param


@pytest.fixture(scope="module")
def file(version, tmp_path_factory):
    return write_rwkv(tmp_path_factory.mktemp("base") / "base.pth", version, hidden=16, layers=2)


@pytest.fixture
def names(version):
    return NAMES[version]


def test_an_adapters_value_takes_the_parameters_place_and_starts_as_the_bases(file, names):
    want = logits(from_pth(file))
    model = get_peft_model(from_pth(file), config(*names)).eval()
    assert close(logits(model), want)
    full = model.peft_config["default"].parameters_to_save
    assert {name.rpartition(".")[2] for name in full} == {name.rpartition(".")[2] for name in names}
    assert len(full) == 6
    fill(model)
    assert close(logits(model), logits(by_hand(file, model)))
    assert not close(logits(model), want)
    with model.disable_adapter():
        assert same_bits(logits(model), want, Promise.SAME_PRODUCT)


def test_gradients_are_those_of_the_parameter_and_the_base_gets_none(file, names):
    model = trained(file, *names, dtype=torch.float64).train()
    hand = by_hand(file, model).train()
    for each in (model, hand):
        each(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for saved in find(model):
        assert close(saved.bone_value["default"].grad, hand.get_parameter(saved.name).grad)
        assert saved.base_layer.grad is None
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trains) == 2 + 6
    assert all(name.endswith((".bone_block.default", ".bone_value.default")) for name in trains)


def test_values_are_kept_in_fp32_and_used_in_the_bases_dtype(file, names):
    model = trained(file, *names, dtype=torch.bfloat16)
    assert {value.dtype for value in values(model).values()} == {torch.float32}
    for saved in find(model):
        assert same_bits(saved(), values(model)[saved.name].bfloat16(), Promise.EXACT)
    low = get_peft_model(from_pth(file, dtype=torch.bfloat16), config(*names), autocast_adapter_dtype=False)
    assert {value.dtype for value in values(low).values()} == {torch.bfloat16}


def test_merging_gives_the_value_and_unmerging_the_base_bit_for_bit(file, names):
    model = trained(file, *names, dtype=torch.bfloat16)
    before, plain = bases(model), logits(from_pth(file, dtype=torch.bfloat16))
    model.base_model.keep_originals(False)  # nothing could compute a value back
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        assert all(same_bits(base, values(model)[n].bfloat16(), Promise.EXACT) for n, base in bases(model).items())
        model.unmerge_adapter()
        assert all(same_bits(base, before[n], Promise.UNTOUCHED) for n, base in bases(model).items())
    model.merge_adapter()
    with model.disable_adapter():  # takes the merge back, as in layers
        assert close(logits(model), plain)
    assert all(same_bits(base, before[n], Promise.UNTOUCHED) for n, base in bases(model).items())


def test_unloading_leaves_plain_parameters_with_the_value_or_the_base(file, names, tmp_path):
    model, bare = trained(file, *names), from_pth(file)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    want, merged_values = logits(model), values(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, SavedParameter) for module in merged.modules())
    assert all(same_bits(merged.get_parameter(n), value, Promise.STORED) for n, value in merged_values.items())
    assert close(logits(merged), want)
    merged.to_pth(tmp_path / "merged.pth")
    assert list(torch.load(tmp_path / "merged.pth")) == list(bare.state_dict())
    for each in (copied, pickled):
        assert same_bits(logits(each), want, Promise.SAME_PRODUCT)
        tensors = each.unload().state_dict()
        assert all(same_bits(tensors[n], tensor, Promise.UNTOUCHED) for n, tensor in bare.state_dict().items())


def test_a_value_that_is_not_finite_is_not_merged_safely_and_nothing_changes(file, names):
    model = trained(file, *names)
    with torch.no_grad():
        find(model)[1].bone_value["default"].view(-1)[0] = float("inf")
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NonFiniteError, match=r"blocks\..*: adapter 'default': its value holds NaN or infinity"):
            merge(safe_merge=True)
        assert_unchanged(model, before)


def test_adapters_switch_their_values_and_others_see_the_base(file, names):
    model = trained(file, *names[:2], adapter="x1")
    model.add_adapter("plain", config())
    model.add_adapter("x3", config(*names[1:]))
    for seed, name in enumerate(("plain", "x3"), 2):
        fill(model, name, seed)
    for name in ("x1", "plain", "x3"):
        model.set_adapter(name)
        assert close(logits(model), logits(by_hand(file, model, name)))
    model.base_model.set_adapter(["x3", "plain"])  # only one of them has values: both act
    assert not close(logits(model), logits(by_hand(file, model, "x3")))
    model.set_adapter("x1")
    with pytest.warns(UserWarning, match="Setting active adapter to plain"):
        model.delete_adapter("x1")  # whose next one is the same in all layers
    assert close(logits(model), logits(by_hand(file, model, "plain")))
    assert len(find(model)) == 4
    model.set_adapter("x3")
    with pytest.warns(UserWarning, match="Setting active adapter to plain"):
        model.delete_adapter("x3")
    assert not find(model)


def test_two_adapters_with_a_value_for_one_parameter_are_not_active_together(file, names):
    model = trained(file, names[0], adapter="x1")
    model.add_adapter("x2", config(names[0]))
    line = r"adapters 'x1' and 'x2' each have a value of their own for blocks\.0\.att\..*; use one of them at a time"
    with pytest.raises(ConfigError, match=line):
        model.base_model.set_adapter(["x1", "x2"])
    assert model.base_model.active_adapters == ["x1"]
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=line):
            merge(adapter_names=["x1", "x2"])
    assert_unchanged(model, before)
    for saved in find(model):
        saved.set_adapter(["x1", "x2"])  # as hosts do, one by one
    with pytest.raises(ConfigError, match=line):
        logits(model)


def test_there_is_no_batch_with_an_adapter_for_each_row(file, names):
    model = trained(file, *names, adapter="x1")
    model.add_adapter("plain", config())
    with pytest.raises(ConfigError, match=r"adapter_names: an adapter of this model trains blocks\.0.* set_adapter"):
        model(TOKENS, adapter_names=["plain", "__base__"])
    model.set_adapter("plain")
    model.delete_adapter("x1")
    assert model(TOKENS, adapter_names=["plain", "__base__"]).logits.shape[0] == 2


def test_there_is_no_lora_and_no_weighted_sum_of_such_an_adapter(file, names):
    model = trained(file, names[0], adapter="x1")
    model.add_adapter("x2", config())
    with pytest.raises(ConfigError, match=r"a plain LoRA has no place for blocks\.0\.att\..*, blocks\.1"):
        model.to_lora("x1")
    with pytest.raises(ConfigError, match=r"\['x1'\] train modules, parameters or biases whole"):
        model.add_weighted_adapter(["x1", "x2"], [0.5, 0.5], "sum")


def test_trls_reference_starts_as_a_copy_of_the_values(file, names):
    model = trained(file, *names)
    model.add_adapter("ref", model.peft_config["default"])
    assert all(same_bits(values(model, "ref")[n], value, Promise.STORED) for n, value in values(model).items())


def test_values_of_an_offloaded_model_are_used_and_neither_added_nor_merged(file, names):
    model = trained(file, *names)
    want = logits(model)
    cpu_offload(model, torch.device("cpu"))
    assert close(logits(model), want)
    for change in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match="it is sharded or offloaded, so an adapter's value"):
            change()
    with pytest.raises(ConfigError, match="it is sharded or offloaded; add the adapter to a model that is whole"):
        get_peft_model(cpu_offload(from_pth(file), torch.device("cpu")), config(*names))


REFUSED = [
    ({"names": ["time_dekay"]}, r"no parameter 'time_dekay' of this Rwkv.ForCausalLM can be trained .* only att\."),
    ({"names": ["att.key.weight"]}, r"no parameter 'att.key.weight' .* modules_to_save trains whole modules"),
    ({"modules_to_save": ["att"], "target_modules": ["ffn.key"]}, "or trained whole .modules_to_save.; leave one out"),
    ({"target_modules": None, "target_parameters": "MATRIX"}, "its module is adapted .target_parameters. or trained"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_kept_is_one_clear_line_and_leaves_no_trace(file, version, fields, message):
    matrix = {6: "att.time_maa_w1", 7: "att.w1"}[version]
    fields = {"names": [matrix]} | fields
    fields |= {"target_parameters": [matrix]} if "target_parameters" in fields else {}
    settings = config(*fields.pop("names"), **fields)
    for model, add in (
        (bare := from_pth(file), lambda: get_peft_model(bare, settings)),
        (live := trained(file, *NAMES[version], adapter="first"), lambda: live.add_adapter("second", settings)),
    ):
        before, want = snapshot(model), logits(model)
        with pytest.raises(ConfigError, match=message) as raised:
            add()
        assert "\n" not in str(raised.value)
        assert_unchanged(model, before)
        assert same_bits(logits(model), want, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["att"]}, {"target_parameters": ["MATRIX"]}], ids=str)
def test_a_later_adapter_leaves_a_module_with_values_alone(file, version, names, fields):
    fields = {"target_parameters": [{6: "time_maa_w1", 7: "w1"}[version]]} if "target_parameters" in fields else fields
    model = trained(file, *names, adapter="first")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"its module is adapted .target_parameters. or trained whole"):
        model.add_adapter("second", config(target_modules=["ffn.key"], **fields))
    assert_unchanged(model, before)


def test_other_models_are_told_of_modules_to_save():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ConfigError, match=r"'1.weight' of this Sequential .* RWKV models of flashbone; modules_to"):
        get_peft_model(model, config("1.weight", target_modules=["0"]))


@needs_transformers_own_adapters
@pytest.mark.filterwarnings("ignore:Could not find a config file in .*pth:UserWarning")  # peft looks for one
def test_transformers_own_methods_do_the_same(file, names, tmp_path):
    model = from_pth(file)
    model.add_adapter(config(*names), "one")
    fill(model, "one")
    want = logits(model)
    model.save_pretrained(tmp_path)
    again = from_pth(file)
    info = again.load_adapter(str(tmp_path))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert close(logits(again), want)
    again.disable_adapters()
    assert same_bits(logits(again), logits(from_pth(file)), Promise.SAME_PRODUCT)
    hosted = inject_adapter_in_model(config(names[0]), from_pth(file), "x1")
    assert len(find(hosted)) == 2
