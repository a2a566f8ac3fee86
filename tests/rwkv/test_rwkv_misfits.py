"""Adapters of another RWKV model: refused by name, live and on disk, and nothing is changed or written."""

import pytest
from peft import BoneConfig, PeftModel, get_peft_model

import flashbone
from flashbone.errors import FlashboneError
from flashbone.rwkv import from_pth
from helpers.adapter_folders import listing
from helpers.comparison import Promise, same_bits
from helpers.rwkv import write_rwkv

OTHERS = {
    "narrower": ({"version": 7, "hidden": 16}, "blocks.0.att.key"),
    "deeper": ({"version": 7, "layers": 5}, "blocks.4.ffn.value"),
    "of RWKV-6": ({"version": 6}, "blocks.0.att.gate"),
}


@pytest.fixture
def base(tmp_path):
    return write_rwkv(tmp_path / "base.pth", 7)


@pytest.mark.parametrize("form", ["peft", "rwkv-peft"])
@pytest.mark.parametrize("other", OTHERS)
def test_an_adapter_of_another_model_is_not_merged(base, other, form, tmp_path):
    sizes, name = OTHERS[other]
    model = from_pth(write_rwkv(tmp_path / "other.pth", **sizes))
    adapted = get_peft_model(model, BoneConfig(r=8, init_weights=False, target_modules="all-linear"))
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    if form == "rwkv-peft":
        flashbone.convert(adapter, tmp_path / "adapter.pth", to="rwkv-peft")
        adapter = tmp_path / "adapter.pth"
    before = listing(tmp_path)
    with pytest.raises(FlashboneError, match=name) as caught:
        flashbone.merge_checkpoint(base, adapter, tmp_path / "out.pth")
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("other", OTHERS)
def test_an_adapter_of_another_model_is_not_loaded(base, other, tmp_path):
    sizes, name = OTHERS[other]
    model = from_pth(write_rwkv(tmp_path / "other.pth", **sizes))
    config = BoneConfig(r=8, init_weights=False, target_modules=[name])  # one layer: PEFT passes over names it lacks
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    target = from_pth(base)
    before = {n: (id(module), type(module)) for n, module in target.named_modules()}
    values = {n: t.clone() for n, t in target.state_dict().items()}
    with pytest.raises((FlashboneError, ValueError), match=name):
        PeftModel.from_pretrained(target, str(tmp_path / "adapter"))
    assert {n: (id(module), type(module)) for n, module in target.named_modules()} == before
    assert all(same_bits(tensor, values[n], Promise.UNTOUCHED) for n, tensor in target.state_dict().items())
