"""Single parameters of RWKV models in files: written, read, merged into checkpoints, swapped, and misfits."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from saved_values import NAMES, TOKENS, assert_unchanged, config, logits, snapshot, trained, values

import flashbone
from flashbone.errors import ConfigError, ShapeError
from flashbone.rwkv import from_pth
from flashbone.tuner.model.saved_parameters import find
from helpers.comparison import Promise, close, same_bits
from helpers.rwkv import write_rwkv


@pytest.fixture(params=[6, 7], ids=lambda v: f"v{v}")
def version(request):
    return request.param


@pytest.fixture
def file(version, tmp_path):
    return write_rwkv(tmp_path / "base.pth", version, hidden=16, layers=2)


@pytest.fixture
def names(version):
    return NAMES[version]


def save(model, folder):
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_a_file_has_the_plain_names_and_gives_the_adapter_back(file, names, tmp_path):
    model = trained(file, *names, adapter="mine")
    folder = save(model, tmp_path / "saved") / "mine"
    tensors = load_file(folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    own = {f"base_model.model.{name}": value for name, value in values(model, "mine").items()}
    assert fields["parameters_to_save"] == [name.removeprefix("base_model.model.") for name in own]
    assert {key for key in tensors if "bone_block" not in key} == own.keys()
    assert all(same_bits(tensors[name], own[name], Promise.STORED) for name in own)
    for fast in (False, True):
        again = PeftModel.from_pretrained(from_pth(file), folder, low_cpu_mem_usage=fast).eval()
        held = get_peft_model_state_dict(again, save_embedding_layers=False)
        assert all(same_bits(held[name], tensor, Promise.STORED) for name, tensor in tensors.items())
        assert close(logits(again), logits(model))  # the fast way leaves them in the file's memory, however aligned
        assert not any(p.requires_grad for p in again.parameters())
        assert same_bits(logits(again.unload()), logits(from_pth(file)), Promise.SAME_PRODUCT)
    again = PeftModel.from_pretrained(from_pth(file), folder, is_trainable=True).eval()
    assert sum(p.requires_grad for p in again.parameters()) == 2 + 6
    again.load_adapter(folder, "second")
    again.set_adapter("second")
    assert close(logits(again), logits(model))


def test_an_adapter_of_rwkv_peft_is_loaded_trained_merged_and_converted_back(file, version, tmp_path):
    base = torch.load(file)
    held = {n: t.bfloat16() * 0.9 for n, t in base.items() if n.endswith(tuple(NAMES[version])) or ".ln_x." in n}
    held |= {f"blocks.{i}.att.key.disha": torch.randn(4, 16).bfloat16() / 4 for i in range(2)}
    torch.save(held, tmp_path / "rwkv-0.pth")
    flashbone.convert(tmp_path / "rwkv-0.pth", tmp_path / "bone", "peft")
    model = PeftModel.from_pretrained(from_pth(file), tmp_path / "bone", is_trainable=True)
    assert values(model).keys() == {n for n in held if not n.endswith(".disha") and ".ln_x." not in n}
    assert all(same_bits(value, held[n].float(), Promise.EXACT) for n, value in values(model).items())

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(value, held[n].float()) for n, value in values(model).items())
    save(model, tmp_path / "trained")
    flashbone.merge_checkpoint(file, tmp_path / "trained", tmp_path / "out.pth")
    disk, live = torch.load(tmp_path / "out.pth"), model.merge_and_unload().state_dict()
    assert disk.keys() == live.keys()
    assert all(same_bits(disk[name], live[name], Promise.SAME_PRODUCT) for name in live)
    flashbone.convert(tmp_path / "trained", tmp_path / "again.pth", "rwkv-peft")
    assert torch.load(tmp_path / "again.pth").keys() == held.keys()


def test_hot_swap_puts_new_values_in_place_and_refuses_other_parameters(file, names, tmp_path):
    new = trained(file, names[0], seed=5)
    save(new, tmp_path / "new")
    save(trained(file, *names), tmp_path / "other")
    model = trained(file, names[0])
    held = [saved.bone_value["default"] for saved in find(model)]
    hotswap_adapter(model, str(tmp_path / "new"), "default")
    assert all(saved.bone_value["default"] is value for saved, value in zip(find(model), held, strict=True))
    assert close(logits(model), logits(new))
    with pytest.raises(ConfigError, match="parameters_to_save: the model has"):
        hotswap_adapter(model, str(tmp_path / "other"), "default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: None, r"blocks\.1\.att\.\w+: the checkpoint has no value for it"),
        (lambda value: value[..., 1:].clone(), r"blocks\.1\.att\.\w+: the model has a tensor of shape .* but .* 15\)"),
        (lambda value: value.long(), r"blocks\.1\.att\.\w+: the checkpoint holds torch.int64"),
    ],
)
def test_a_file_that_does_not_fit_leaves_no_trace(file, names, change, message, tmp_path):
    weights = save(trained(file, names[0]), tmp_path / "saved") / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = f"base_model.model.blocks.1.att.{names[0]}"
    tensors[key] = change(tensors[key])
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, weights)
    bare = from_pth(file)
    before = snapshot(bare)
    with pytest.raises(ShapeError, match=message):
        PeftModel.from_pretrained(bare, weights.parent)
    assert_unchanged(bare, before)
    model = trained(file, *names, adapter="first")
    model.merge_adapter()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter cannot be set when the model is merged")
        with pytest.raises(ShapeError, match=message):
            model.load_adapter(weights.parent, "second")
    assert_unchanged(model, before)
    assert all(saved.merged_adapters == ["first"] for saved in find(model))


def test_the_tensors_of_an_adapter_are_its_own_whoever_asks(file, names):
    model = trained(file, names[0], adapter="x1")
    model.add_adapter("x2", config(names[1]))
    for adapter, name in (("x1", names[0]), ("x2", names[1])):
        keys = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        others = {key for key in keys if "bone_block" not in key}
        assert others == {f"base_model.model.blocks.{i}.att.{name}" for i in range(2)}
