"""Parameters that are trained whole, in files: written, read, merged into checkpoints, swapped, and misfits."""

import io
import json
import warnings

import pytest
import torch
from decay_models import DECAYS, WIDTH, assert_unchanged, base, config, fill, inputs, snapshot, trained, values
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

import flashbone
from flashbone.errors import ConfigError, ShapeError
from flashbone.rwkv import from_pth
from flashbone.tuner.model.saved_parameters import find
from helpers.comparison import Promise, close, same_bits
from helpers.rwkv import write_rwkv


def test_the_state_dict_of_the_model_goes_through_a_file():
    model, other = trained("time_decay", "scale"), get_peft_model(base(), config("time_decay", "scale"))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert same_bits(other(inputs()), model(inputs()), Promise.SAME_PRODUCT)


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
    own = {f"base_model.model.{name}": value for name, value in values(model, "mine").items()}
    assert all(same_bits(tensors[name], own[name], Promise.STORED) for name in own)
    for fast in (False, True):
        again = PeftModel.from_pretrained(base(), tmp_path / "mine", low_cpu_mem_usage=fast)
        held = get_peft_model_state_dict(again)
        assert all(same_bits(held[name], tensor, Promise.STORED) for name, tensor in tensors.items())
        assert close(again(inputs()), model(inputs()))  # the fast way leaves them in the file's memory, however aligned
        assert not any(p.requires_grad for p in again.parameters())
        assert same_bits(again.unload()(inputs()), base()(inputs()), Promise.SAME_PRODUCT)
    again = PeftModel.from_pretrained(base(), tmp_path / "mine", is_trainable=True)
    assert sum(p.requires_grad for p in again.parameters()) == 7
    again.load_adapter(tmp_path / "mine", "second")
    again.set_adapter("second")
    assert same_bits(again(inputs()), model(inputs()), Promise.SAME_PRODUCT)


def test_the_checkpoint_merge_and_the_live_merge_are_equal_to_the_bit(tmp_path):
    model = trained("time_decay", "scale", "time_maa_w2", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(base(torch.bfloat16).state_dict(), tmp_path / "base/model.safetensors")
    flashbone.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    disk, live = load_file(tmp_path / "out/model.safetensors"), model.merge_and_unload().state_dict()
    assert disk.keys() == live.keys()
    assert all(same_bits(disk[name], live[name], Promise.SAME_PRODUCT) for name in live)


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
    assert all(same_bits(value, state[name].float(), Promise.EXACT) for name, value in values(model).items())

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(inputs()).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(value, state[name].float()) for name, value in values(model).items())
    model.save_pretrained(tmp_path / "trained")
    (tmp_path / "base").mkdir()
    save_file(base().state_dict(), tmp_path / "base/model.safetensors")
    flashbone.merge_checkpoint(tmp_path / "base", tmp_path / "trained", tmp_path / "out")
    disk, live = load_file(tmp_path / "out/model.safetensors"), model.merge_and_unload().state_dict()
    assert all(same_bits(disk[name], live[name], Promise.SAME_PRODUCT) for name in live)
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
        assert same_bits(again(tokens).logits, want, Promise.SAME_PRODUCT)
    flashbone.merge_checkpoint(file, tmp_path / "adapter", tmp_path / "out.pth")
    disk, live = torch.load(tmp_path / "out.pth", weights_only=True), model.merge_and_unload().state_dict()
    assert disk.keys() == live.keys()
    assert all(same_bits(disk[name], live[name], Promise.SAME_PRODUCT) for name in live)


def test_hot_swap_puts_new_values_in_place_and_refuses_other_parameters(tmp_path):
    trained("time_decay", seed=5).save_pretrained(tmp_path / "new")
    trained("time_decay", "scale").save_pretrained(tmp_path / "other")
    model = trained("time_decay")
    held = [saved.bone_parameter["default"] for saved in find(model)]
    hotswap_adapter(model, str(tmp_path / "new"), "default")
    assert all(saved.bone_parameter["default"] is value for saved, value in zip(find(model), held, strict=True))
    assert same_bits(model(inputs()), trained("time_decay", seed=5)(inputs()), Promise.SAME_PRODUCT)
    with pytest.raises(ConfigError, match="parameters_to_save: the model has"):
        hotswap_adapter(model, str(tmp_path / "other"), "default")


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


def test_the_tensors_of_an_adapter_are_its_own_whoever_asks():
    model = trained("time_decay", adapter="x1")
    model.add_adapter("x2", config("scale"))
    keys = {name: set(get_peft_model_state_dict(model, adapter_name=name)) for name in ("x1", "x2")}
    others = {name: {key for key in found if "bone_block" not in key} for name, found in keys.items()}
    assert others == {"x1": {f"base_model.model.{n}" for n in DECAYS}, "x2": {"base_model.model.scale"}}
