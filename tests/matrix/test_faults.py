"""Whatever goes wrong with an adapter, the base gives its own outputs bit for bit afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from flashbone import BoneConfig, FlashboneError
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, same_bits
from helpers.mlp import fill_blocks

IDS = torch.arange(12).view(2, 6)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def llama(hidden: int = 16, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


def config(variant: str, **fields) -> BoneConfig:
    return BoneConfig(r=4, variant=variant, mini_r=2, target_modules=["q_proj", "down_proj"], **fields)


def adapted(variant: str, model: LlamaForCausalLM | None = None) -> PeftModel:
    peft_model = get_peft_model(model or llama(), config(variant)).eval()
    fill_blocks(peft_model)
    return peft_model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def rewritten(folder: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def garble(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 300)


def drop_a_layer(folder: Path) -> None:
    rewritten(folder, lambda blocks: {name: b for name, b in blocks.items() if "layers.1.mlp" not in name})


def integers(folder: Path) -> None:
    rewritten(folder, lambda blocks: {name: (b * 8).long() for name, b in blocks.items()})


def break_the_config(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:-20])


def unknown_variant(folder: Path) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | {"variant": "bat-diagonal"}))


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def of_another_model(folder: Path) -> None:
    adapted("bone", llama(hidden=20)).save_pretrained(folder)


FAULTS = [truncate, garble, drop_a_layer, integers, break_the_config, unknown_variant, no_weights, of_another_model]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_file_that_cannot_be_loaded_leaves_no_trace(fault, variant, tmp_path):
    adapted(variant).save_pretrained(tmp_path)
    fault(tmp_path)
    bare, want = llama(), logits(llama())
    with pytest.raises(Exception) as caught:  # noqa: PT011  (some are PEFT's own)
        PeftModel.from_pretrained(bare, tmp_path)
    assert str(caught.value).strip()
    assert same_bits(logits(bare), want, Promise.SAME_PRODUCT)
    assert not [name for name, _ in bare.named_parameters() if "bone" in name]
    model = adapted("bone")
    with_adapter = logits(model)
    with pytest.raises(type(caught.value)):
        model.load_adapter(tmp_path, "other")
    assert same_bits(logits(model), with_adapter, Promise.SAME_PRODUCT)
    assert list(model.peft_config) == ["default"]
    with model.disable_adapter():
        assert same_bits(logits(model), want, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_broken_adapter_taints_neither_the_base_nor_the_others(variant, tmp_path):
    broken = adapted(variant)
    next(p for name, p in broken.named_parameters() if "down_proj.bone_block" in name).data.view(-1)[0] = torch.nan
    broken.save_pretrained(tmp_path)
    model, want = adapted("bone"), logits(llama())
    with_adapter = logits(model)
    model.load_adapter(tmp_path, "broken")
    model.set_adapter("broken")
    assert logits(model).isnan().any()
    with pytest.raises(FlashboneError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(FlashboneError, match="NaN or infinite"):
        model.merge_and_unload(safe_merge=True)
    with model.disable_adapter():
        assert same_bits(logits(model), want, Promise.SAME_PRODUCT)
    model.merge_adapter()
    model.unmerge_adapter()
    model.set_adapter("default")
    assert same_bits(logits(model), with_adapter, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_loading_while_merged_takes_the_merge_back_and_a_failure_leaves_it(variant, tmp_path):
    adapted(variant).save_pretrained(tmp_path)
    model, want = adapted("bone"), logits(llama())
    unmerged = logits(model)
    model.merge_adapter()
    merged = logits(model)
    (tmp_path / "broken").mkdir()
    for file in (WEIGHTS, CONFIG):
        (tmp_path / "broken" / file).write_bytes((tmp_path / file).read_bytes())
    truncate(tmp_path / "broken")
    with pytest.warns(UserWarning, match="Unmerging the model first"), pytest.raises(FlashboneError, match="be read"):
        model.load_adapter(tmp_path / "broken", "third")
    assert same_bits(logits(model), merged, Promise.SAME_PRODUCT)
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # PEFT's way
        model.load_adapter(tmp_path, "other")
    assert same_bits(logits(model), unmerged, Promise.SAME_PRODUCT)
    with model.disable_adapter():
        assert same_bits(logits(model), want, Promise.SAME_PRODUCT)
    model.set_adapter("other")
    assert same_bits(logits(model), logits(adapted(variant)), Promise.SAME_PRODUCT)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_deleting_the_active_adapter_gives_the_base_back(variant, merged):
    model, want = adapted(variant), logits(llama())
    if merged:
        model.merge_adapter()
        model.unmerge_adapter()
    model.add_adapter("other", config("bone"))
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert same_bits(logits(model), want, Promise.EXACT)  # the other one starts at zero
    model.delete_adapter("other")
    # PeftModel itself cannot be called without any adapter, whatever the method; what it holds can.
    assert same_bits(logits(model.base_model.model), want, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_full_disk_while_saving_leaves_the_model_as_it_was(variant, tmp_path, monkeypatch):
    import peft.peft_model

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model, want = adapted(variant), logits(llama())
    with_adapter = logits(model)
    monkeypatch.setattr(peft.peft_model, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert same_bits(logits(model), with_adapter, Promise.SAME_PRODUCT)
    with model.disable_adapter():
        assert same_bits(logits(model), want, Promise.SAME_PRODUCT)
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert same_bits(logits(PeftModel.from_pretrained(llama(), tmp_path)), with_adapter, Promise.SAME_PRODUCT)
