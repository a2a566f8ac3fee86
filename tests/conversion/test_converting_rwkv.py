"""Adapters on RWKV-7 and RWKV-6: from the live model to RWKV-PEFT's file and back, to the bit."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from flashbone import BoneConfig, merge_checkpoint
from flashbone.conversion import convert
from flashbone.rwkv import from_pth
from helpers.comparison import Promise, close, same_bits
from helpers.rwkv import write_rwkv

SINGLE = {7: ["x_w", "a0", "v2", "r_k", "ffn.x_k"], 6: ["time_decay", "time_faaaa", "time_maa_w2", "ffn.time_maa_r"]}


def trained(base: Path, version: int, variant: str, dtype: torch.dtype, **fields) -> PeftModel:
    """An adapter with LayerNorms and single parameters, all of it random."""
    norms = ["ln0", "ln1", "ln2", "ln_x", "ln_out"]
    saved = {"modules_to_save": norms, "parameters_to_save": SINGLE[version]}
    config = BoneConfig(variant=variant, r=4, target_modules=["receptance", "ffn.key", "output"], **(saved | fields))
    model = get_peft_model(from_pth(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (parameter + torch.randn_like(parameter) / 20).to(dtype)
    return model.eval()


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6)).logits


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], promise: Promise = Promise.STORED) -> None:
    assert got.keys() == want.keys()
    assert all(same_bits(got[name], want[name], promise) for name in want)


@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize(("variant", "dtype"), [("bone", torch.float32), ("bat-row", torch.bfloat16)], ids=str)
def test_the_way_to_rwkv_peft_and_back_is_equal_to_the_bit(tmp_path, version, variant, dtype):
    base = write_rwkv(tmp_path / "base.pth", version)
    model = trained(base, version, variant, dtype)
    model.save_pretrained(tmp_path / "one", save_embedding_layers=False)
    report = convert(tmp_path / "one", tmp_path / "rwkv-0.pth", "rwkv-peft")
    state = torch.load(tmp_path / "rwkv-0.pth", weights_only=True)
    assert report.modules == sum(key.endswith(".disha") for key in state)
    assert report.replaced == len(state) - report.modules
    names = torch.load(base, weights_only=True).keys()
    assert {key.replace(".disha", ".weight") for key in state} <= names
    assert {key.rpartition(".")[2] for key in state} > {name.rpartition(".")[2] for name in SINGLE[version]}
    convert(tmp_path / "rwkv-0.pth", tmp_path / "two", "peft")
    assert_equal(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one")))
    convert(tmp_path / "two", tmp_path / "rwkv-1.pth", "rwkv-peft")
    assert_equal(torch.load(tmp_path / "rwkv-1.pth", weights_only=True), state)
    for name in ("one", "two"):
        assert same_bits(
            logits(PeftModel.from_pretrained(from_pth(base), tmp_path / name)), logits(model), Promise.SAME_PRODUCT
        )


@pytest.mark.parametrize("version", [7, 6])
def test_all_three_forms_merge_to_the_same_bytes_as_the_live_model(tmp_path, version):
    base = write_rwkv(tmp_path / "base.pth", version)
    model = trained(base, version, "bone", torch.float32)
    model.save_pretrained(tmp_path / "one", save_embedding_layers=False)
    convert(tmp_path / "one", tmp_path / "rwkv-0.pth", "rwkv-peft")
    convert(tmp_path / "rwkv-0.pth", tmp_path / "two", "peft")
    for name in ("one", "rwkv-0.pth", "two"):
        merge_checkpoint(base, tmp_path / name, tmp_path / f"merged-{name.removesuffix('.pth')}.pth")
    model.merge_and_unload().to_pth(tmp_path / "live.pth")
    live = torch.load(tmp_path / "live.pth", weights_only=True)
    for name in ("one", "rwkv-0", "two"):
        merged = torch.load(tmp_path / f"merged-{name}.pth", weights_only=True)
        assert_equal(merged, live, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("version", [7, 6])
def test_a_lora_of_the_same_adapter_takes_the_sizes_from_the_pth_file(tmp_path, version):
    base = write_rwkv(tmp_path / "base.pth", version)
    model = trained(base, version, "bone", torch.float32, parameters_to_save=None)
    model.save_pretrained(tmp_path / "one", save_embedding_layers=False)
    for out, given in (("lora", base), ("again", None)):  # the adapter's config names the file
        assert convert(tmp_path / "one", tmp_path / out, "lora", base=given).exact
    assert_equal(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "again")))
    got = logits(PeftModel.from_pretrained(from_pth(base), tmp_path / "lora"))
    assert close(got, logits(model))
