"""Single parameters that an adapter keeps whole: what they do in a live model, in files, in merges; what is refused."""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import flashbone
from flashbone import BoneConfig
from flashbone.errors import ConfigError, FlashboneError, NonFiniteError, ShapeError
from flashbone.rwkv import from_pth
from flashbone.tuner.saved_parameters import SavedParameter, find
from helpers.comparison import close
from helpers.processes import run_apart
from helpers.rwkv import write_rwkv

WIDTH = 8
DECAYS = ["blocks.0.att.time_decay", "blocks.1.att.time_decay"]


class Attention(nn.Module):
    """Names as in RWKV-6's own checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.time_maa_x = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.time_decay = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.time_maa_w2 = nn.Parameter(torch.randn(2, 3, WIDTH))
        self.key, self.output = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.ln_x = nn.LayerNorm(WIDTH)

    def decay(self):
        return torch.exp(-torch.exp(self.time_decay))

    def forward(self, x):
        mixed = self.key(x + x.roll(1, -1) * self.time_maa_x) * self.decay() + self.time_maa_w2.sum((0, 1))
        return x + self.output(self.ln_x(mixed))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att = Attention()


class Model(nn.Module):
    checkpoints = False

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block.att, x, use_reentrant=False) if self.checkpoints else block.att(x)
        return x * self.scale


def base(dtype=torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def config(*names, **fields) -> BoneConfig:
    return BoneConfig(**{"r": 4, "target_modules": ["key", "output"], "parameters_to_save": list(names)} | fields)


def inputs(dtype=torch.float32):
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)


def fill(model, adapter="default", seed=1) -> None:
    """Random numbers for all that the adapter has."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".bone_" in name and name.endswith(f".{adapter}"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) / 4


def trained(*names, adapter="default", dtype=torch.float32, seed=1, **fields):
    model = get_peft_model(base(dtype), config(*names, **fields), adapter)
    fill(model, adapter, seed)
    return model


def values(model, adapter="default"):
    held = {saved.name: saved.bone_parameter for saved in find(model)}
    return {name: adapters[adapter].detach() for name, adapters in held.items() if adapter in adapters}


def snapshot(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [name for name, p in model.named_parameters() if p.requires_grad], [*map(type, model.modules())]


def assert_unchanged(model, before) -> None:
    tensors, *rest = snapshot(model)
    assert list(tensors) == list(before[0])
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())
    assert rest == list(before[1:])


def by_hand(model, adapter="default") -> Model:
    """The bare model with the adapter's numbers put in by hand."""
    bare = base()
    with torch.no_grad():
        for name, value in values(model, adapter).items():
            bare.get_parameter(name).copy_(value)
        for name, layer in model.base_model._bone_layers():
            bare.get_submodule(name).weight += layer.get_delta_weight(adapter)
    return bare


def test_the_adapters_value_takes_the_parameters_place_and_starts_as_the_bases():
    bare = base()
    want = bare(inputs())
    model = get_peft_model(base(), config("time_decay", "att.time_maa_x", "scale"))
    assert torch.equal(model(inputs()), want)
    assert model.peft_config["default"].parameters_to_save == [
        *("scale", "blocks.0.att.time_maa_x", "blocks.0.att.time_decay"),
        *("blocks.1.att.time_maa_x", "blocks.1.att.time_decay"),
    ]
    fill(model)
    assert not close(model(inputs()), want)
    assert close(model(inputs()), by_hand(model)(inputs()))
    attention = model.base_model.model.blocks[0].att
    assert torch.equal(attention.decay(), torch.exp(-torch.exp(values(model)[DECAYS[0]])))  # outside of forward, too
    with model.disable_adapter():
        assert torch.equal(model(inputs()), want)
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
    assert all(torch.equal(got[name], want[name]) for name in want)


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
    assert torch.equal(model.base_model.model.scale, values(model)["scale"].bfloat16())
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
        assert all(
            torch.equal(saved.base_layer.original, values(model)[saved.name].bfloat16()) for saved in find(model)
        )
        with torch.no_grad():
            merged = model(x)
        model.unmerge_adapter()
        assert all(torch.equal(saved.base_layer.original, bare.get_parameter(saved.name)) for saved in find(model))
    assert merged.shape == x.shape
    model.merge_adapter()
    with model.disable_adapter():  # takes the merge back, as layers do
        model(x)
    assert torch.equal(find(model)[0].base_layer.original, bare.get_parameter(find(model)[0].name))


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
    assert all(torch.equal(merged.get_parameter(name), value) for name, value in merged_values.items())
    assert close(merged(inputs()), want(inputs()))
    assert not any(isinstance(module, SavedParameter) for module in merged.modules())
    assert type(merged.blocks[0].att) is Attention
    assert type(merged) is Model


def test_unload_leaves_the_base():
    model, bare = trained("time_decay", "scale"), base()
    unloaded = model.unload()
    assert list(unloaded.state_dict()) == list(bare.state_dict())
    assert all(torch.equal(tensor, bare.state_dict()[name]) for name, tensor in unloaded.state_dict().items())


def test_an_unloaded_copy_leaves_the_original_as_it_is():
    model = trained("time_decay", "scale")
    want = model(inputs())
    merged = copy.deepcopy(model).merge_and_unload()
    assert close(merged(inputs()), want)
    assert torch.equal(model(inputs()), want)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(inputs()), want)
    assert torch.equal(copy.deepcopy(again).unload()(inputs()), base()(inputs()))


def test_the_state_dict_of_the_model_goes_through_a_file():
    model, other = trained("time_decay", "scale"), get_peft_model(base(), config("time_decay", "scale"))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(inputs()), model(inputs()))


def test_a_file_has_the_plain_names_and_gives_the_adapter_back(tmp_path):
    model = trained("time_decay", "scale", adapter="mine")
    model.save_pretrained(tmp_path)
    tensors, fields = (
        load_file(tmp_path / "mine/adapter_model.safetensors"),
        json.loads((tmp_path / "mine/adapter_config.json").read_text()),
    )
    assert fields["parameters_to_save"] == ["scale", *DECAYS]
    assert {key for key in tensors if "bone_block" not in key} == {
        f"base_model.model.{name}" for name in [*DECAYS, "scale"]
    }
    assert all(torch.equal(tensors[f"base_model.model.{n}"], value) for n, value in values(model, "mine").items())
    for fast in (False, True):
        again = PeftModel.from_pretrained(base(), tmp_path / "mine", low_cpu_mem_usage=fast)
        assert torch.equal(again(inputs()), model(inputs()))
        assert not any(p.requires_grad for p in again.parameters())
        assert torch.equal(again.unload()(inputs()), base()(inputs()))
    again = PeftModel.from_pretrained(base(), tmp_path / "mine", is_trainable=True)
    assert sum(p.requires_grad for p in again.parameters()) == 7
    again.load_adapter(tmp_path / "mine", "second")
    again.set_adapter("second")
    assert torch.equal(again(inputs()), model(inputs()))


def test_the_checkpoint_merge_and_the_live_merge_are_equal_to_the_bit(tmp_path):
    model = trained("time_decay", "scale", "time_maa_w2", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(base(torch.bfloat16).state_dict(), tmp_path / "base/model.safetensors")
    flashbone.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    disk, live = load_file(tmp_path / "out/model.safetensors"), model.merge_and_unload().state_dict()
    assert disk.keys() == live.keys()
    assert all(torch.equal(disk[name], live[name]) for name in live)


def test_an_adapter_of_rwkv_peft_is_converted_loaded_trained_and_merged(tmp_path):
    state = {}
    for layer in range(2):
        lead = f"blocks.{layer}.att"
        state |= {f"{lead}.{name}.disha": torch.randn(4, WIDTH).bfloat16() / 4 for name in ("key", "output")}
        state |= {f"{lead}.ln_x.{leaf}": torch.randn(WIDTH).bfloat16() for leaf in ("weight", "bias")}
        state |= {f"{lead}.time_decay": torch.randn(1, 1, WIDTH).bfloat16()}
        state |= {f"{lead}.time_maa_w2": torch.randn(2, 3, WIDTH).bfloat16()}
    torch.save(state, tmp_path / "rwkv-0.pth")
    flashbone.convert(tmp_path / "rwkv-0.pth", tmp_path / "bone", "peft")
    model = PeftModel.from_pretrained(base(), tmp_path / "bone", is_trainable=True)
    assert values(model).keys() == {key for key in state if "time_" in key}
    assert all(torch.equal(value, state[name].float()) for name, value in values(model).items())

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(inputs()).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(value, state[name].float()) for name, value in values(model).items())
    model.save_pretrained(tmp_path / "trained")
    (tmp_path / "base").mkdir()
    save_file(base().state_dict(), tmp_path / "base/model.safetensors")
    flashbone.merge_checkpoint(tmp_path / "base", tmp_path / "trained", tmp_path / "out")
    disk, live = load_file(tmp_path / "out/model.safetensors"), model.merge_and_unload().state_dict()
    assert all(torch.equal(disk[name], live[name]) for name in live)
    flashbone.convert(tmp_path / "trained", tmp_path / "again.pth", "rwkv-peft")
    assert torch.load(tmp_path / "again.pth", weights_only=True).keys() == state.keys()


@pytest.mark.parametrize(("version", "names"), [(6, ["time_decay", "time_maa_w2"]), (7, ["att.w0", "k_k", "x_r"])])
def test_an_rwkv_model_and_its_own_checkpoint_get_the_same_numbers(version, names, tmp_path):
    file = write_rwkv(tmp_path / "base.pth", version)
    tokens = torch.arange(8).view(2, 4)
    model = get_peft_model(from_pth(file).eval(), config(*names, target_modules=["att.key"]))
    fill(model)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(saved.bone_parameter["default"].grad.abs().max() > 0 for saved in find(model))
    model.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with torch.no_grad():
        want = model(tokens).logits
        again = PeftModel.from_pretrained(from_pth(file).eval(), tmp_path / "adapter")
        assert torch.equal(again(tokens).logits, want)
    flashbone.merge_checkpoint(file, tmp_path / "adapter", tmp_path / "out.pth")
    disk, live = torch.load(tmp_path / "out.pth", weights_only=True), model.merge_and_unload().state_dict()
    assert disk.keys() == live.keys()
    assert all(torch.equal(disk[name], live[name]) for name in live)


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
            assert torch.equal(model.base_model.model.get_submodule("blocks.0.att").decay(), _decay(model, name))
            got = model.base_model.model
            for part in key.split("."):
                got = getattr(got, part)
            assert torch.equal(got, want)
    assert torch.equal(trained("time_decay", adapter="x1")(inputs()), _with(model, "x1"))
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
    assert torch.equal(model.base_model.model.blocks[0].att.time_decay, base().blocks[0].att.time_decay)


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
    assert torch.equal(model(inputs()), trained("time_decay", adapter="x1").eval()(inputs()))


def by_hand_without_values(model, adapter):
    bare = base()
    with torch.no_grad():
        for name, layer in model.base_model._bone_layers():
            bare.get_submodule(name).weight += layer.get_delta_weight(adapter)
    return bare


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
    assert torch.equal(find(model)[0].base_layer.original, base().blocks[0].att.time_decay)


def test_there_is_no_lora_and_no_weighted_sum_of_such_an_adapter():
    model = trained("time_decay", adapter="x1")
    model.add_adapter("x2", config())
    with pytest.raises(ConfigError, match=r"a plain LoRA has no place for blocks\.0\.att\.time_decay, blocks\.1"):
        model.to_lora("x1")
    with pytest.raises(ConfigError, match=r"\['x1'\] train modules, parameters or biases as a whole"):
        model.add_weighted_adapter(["x1", "x2"], [0.5, 0.5], "sum")
    assert not model.base_model.supports_lora_conversion()


def test_hot_swap_puts_new_values_in_place_and_refuses_other_parameters(tmp_path):
    trained("time_decay", seed=5).save_pretrained(tmp_path / "new")
    trained("time_decay", "scale").save_pretrained(tmp_path / "other")
    model = trained("time_decay")
    held = [saved.bone_parameter["default"] for saved in find(model)]
    hotswap_adapter(model, str(tmp_path / "new"), "default")
    assert all(saved.bone_parameter["default"] is value for saved, value in zip(find(model), held, strict=True))
    assert torch.equal(model(inputs()), trained("time_decay", seed=5)(inputs()))
    with pytest.raises(ConfigError, match="parameters_to_save: the model has"):
        hotswap_adapter(model, str(tmp_path / "other"), "default")


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
    assert torch.equal(model(inputs()), want)


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
    assert torch.equal(again(inputs()), want)
    again.add_adapter("second", config("time_decay", **fields))
    fill(again, "second", 4)
    assert torch.equal(again(inputs()), want)
    again.set_adapter("second")
    assert not close(again(inputs()), want)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        again.delete_adapter("second")
    assert torch.equal(again(inputs()), want)
    assert close(model.merge_and_unload()(inputs()), want)


def without_a_value(tensors):
    del tensors[f"base_model.model.{DECAYS[1]}"]


def of_another_size(tensors):
    tensors[f"base_model.model.{DECAYS[1]}"] = torch.ones(1, 1, WIDTH + 1)


def of_integers(tensors):
    tensors[f"base_model.model.{DECAYS[1]}"] = torch.ones(1, 1, WIDTH, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_value, r"blocks\.1\.att\.time_decay: the checkpoint has no value for it"),
        (
            of_another_size,
            r"blocks\.1\.att\.time_decay: the model has a tensor of shape \(1, 1, 8\) but .* \(1, 1, 9\)",
        ),
        (of_integers, r"blocks\.1\.att\.time_decay: the checkpoint holds torch.int64"),
    ],
)
def test_a_file_that_does_not_fit_leaves_no_trace(change, message, tmp_path):
    trained("time_decay").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    bare = base()
    before = snapshot(bare)
    with pytest.raises(ShapeError, match=message):
        PeftModel.from_pretrained(bare, tmp_path)
    assert_unchanged(bare, before)
    model = trained("time_decay", "scale", adapter="first")
    model.merge_adapter()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter cannot be set when the model is merged")
        with pytest.raises(ShapeError, match=message):
            model.load_adapter(tmp_path, "second")
    assert_unchanged(model, before)
    assert all(saved.merged_adapters == ["first"] for saved in find(model))


def test_trls_reference_starts_as_a_copy_of_the_values():
    model = trained("time_decay")
    model.add_adapter("ref", model.peft_config["default"])
    assert all(torch.equal(values(model, "ref")[name], value) for name, value in values(model).items())


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
    assert torch.equal(model(inputs()), before)


@pytest.mark.parametrize("mark", ["ds_status", "full_tensor"])
def test_shards_are_refused_where_an_adapter_is_added_and_where_a_value_is_read(mark):
    bare = base()
    setattr(bare.scale, mark, None)
    with pytest.raises(ConfigError, match="parameters_to_save: scale: it is sharded or offloaded; add the adapter to"):
        get_peft_model(bare, config("scale"))
    model = trained("scale")
    shard = nn.Parameter(torch.empty(0))
    setattr(shard, mark, None)
    find(model)[0].bone_parameter._parameters["default"] = shard
    with pytest.raises(
        ConfigError, match=r"scale: a single parameter .* cannot be read from shards of FSDP2 or ZeRO-3"
    ):
        model(inputs())


FSDP2 = """
import torch, torch.distributed as dist
import flashbone
from peft import BoneConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

class Mix(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.decay = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.key(x) * self.decay

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = Mix()

    def forward(self, x):
        return x + self.mix(x)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
config = BoneConfig(r=4, target_modules=["key"], init_weights=False, parameters_to_save=["decay"])
model, x = get_peft_model(torch.nn.Sequential(Layer(), Layer()), config), torch.randn(3, 8)
want = model(x)
want.sum().backward()
grads = [p.grad for p in model.parameters() if p.requires_grad]
model.zero_grad()
for layer in model.base_model.model:
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
got = model(x)
got.sum().backward()
sharded = [p.grad.full_tensor() for p in model.parameters() if p.requires_grad]
assert torch.equal(got, want) and all(map(torch.equal, sharded, grads)) and len(grads) == 4
for change in (lambda: model.base_model.model[0].mix.decay, model.merge_adapter, model.unload):
    try:
        change()
    except flashbone.FlashboneError as error:
        print(error)
dist.destroy_process_group()
"""


def test_fsdp2_may_shard_whole_layers_and_what_would_need_them_whole_is_refused(tmp_path):
    done = run_apart(FSDP2, tmp_path)
    said = ["cannot be read from shards", "it is sharded or offloaded, so", "cannot be made plain again there"]
    lines = done.stdout.splitlines()
    assert len(lines) == len(said), done.stderr
    assert all(line.startswith("0.mix.decay: ") and part in line for line, part in zip(lines, said, strict=True))


def test_values_of_an_offloaded_model_are_used_and_not_trained_nor_merged():
    model = trained("time_decay", "scale").eval()
    want = model(inputs())
    cpu_offload(model, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(model(inputs()), want)
        with model.disable_adapter():
            assert torch.equal(model(inputs()), base()(inputs()))
    model.set_requires_grad("default")
    with pytest.raises(ConfigError, match="was offloaded with the model, so that it cannot be trained"):
        model.train()(inputs())
    for change in (model.merge_adapter, model.merge_and_unload, model.unload):
        with pytest.raises(ConfigError, match=r"time_decay: it (is|was) sharded or offloaded"):
            change()
    with pytest.raises(ConfigError, match=r"time_decay .and 1 more.: it is sharded or offloaded; add the adapter to a"):
        get_peft_model(cpu_offload(base(), torch.device("cpu")), config("time_decay"))
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs()), want)


def test_the_tensors_of_an_adapter_are_its_own_whoever_asks():
    model = trained("time_decay", adapter="x1")
    model.add_adapter("x2", config("scale"))
    keys = {name: set(get_peft_model_state_dict(model, adapter_name=name)) for name in ("x1", "x2")}
    others = {name: {key for key in found if "bone_block" not in key} for name, found in keys.items()}
    assert others == {"x1": {f"base_model.model.{n}" for n in DECAYS}, "x2": {"base_model.model.scale"}}
