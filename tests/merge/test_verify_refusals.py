"""What cannot be verified is refused by name, before a merge where that can be known."""

import json
from pathlib import Path

import pytest
import torch
from verified_merges import BERT, LLAMA, fitting_adapter, lively, verify, write_merge

from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.merge.verify import check_verifiable, compare_logits
from helpers.adapter_folders import tiny_bert, tiny_llama, write_adapter
from helpers.families import FAMILIES


def _refused(tmp_path: Path, message: str, adapters=("adapter",), weights=None, error=FormatError) -> None:
    with pytest.raises(error, match=rf"^[^\n]*{message}[^\n]*$"):
        verify(tmp_path, *adapters, weights=weights)


def test_what_cannot_be_verified_is_refused_by_name(tmp_path):
    model = write_merge(tmp_path, tiny_llama, LLAMA)
    _refused(tmp_path, "weights: got 2 for 1 adapters", weights=[1, 2], error=ConfigError)
    head = {"lm_head.weight": torch.randn(50, 20)}
    fitting_adapter(tmp_path / "head", model, LLAMA, others=head, modules_to_save=["lm_head"])
    _refused(tmp_path, "head: such a merge cannot be verified", ["adapter", "head"], error=ConfigError)
    fitting_adapter(tmp_path / "other", tiny_bert(), BERT)
    _refused(tmp_path, "Target modules .* not found in the base model", ["other"], error=ConfigError)
    narrow = {f"model.layers.{n}.self_attn.q_proj": torch.randn(4, 12) for n in range(2)}
    write_adapter(tmp_path / "narrow", "bone", narrow, target_modules=["q_proj"])
    _refused(tmp_path, "q_proj: .*shape", ["narrow"], error=FlashboneError)
    torch.save({"emb.weight": torch.ones(2), "blocks.0.att.key.weight": torch.ones(2)}, tmp_path / "rwkv.pth")
    with pytest.raises(FormatError, match=r"rwkv\.pth: is no RWKV model, .*; it can be merged, but not verified$"):
        compare_logits(tmp_path / "rwkv.pth", [tmp_path / "adapter"], None, tmp_path / "out")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    _refused(tmp_path, "this is a LORA adapter")


def test_what_can_never_be_verified_is_known_before_a_merge(tmp_path):
    model = lively(tiny_bert())
    model.save_pretrained(tmp_path / "base")
    adapter = fitting_adapter(tmp_path / "adapter", model, BERT)
    head = {"classifier.bias": torch.randn(2)}
    head = fitting_adapter(tmp_path / "head", model, BERT, others=head, modules_to_save=["classifier"])
    check_verifiable(tmp_path / "base", [adapter, adapter], [0.5, -0.5])
    check_verifiable(tmp_path / "base", [head], None)
    with pytest.raises(ConfigError, match="weights: got 1 for 2 adapters"):
        check_verifiable(tmp_path / "base", [adapter, adapter], [1.0])
    with pytest.raises(ConfigError, match="head: such a merge cannot be verified"):
        check_verifiable(tmp_path / "base", [head, head], None)
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(FormatError, match=r"base: has no config\.json"):
        check_verifiable(tmp_path / "base", [adapter], None)


def test_models_that_transformers_cannot_load_or_run_are_refused(tmp_path):
    write_merge(tmp_path, tiny_llama, LLAMA)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "never heard of"}))
    _refused(tmp_path, "base: cannot be verified, .*never heard of")
    (tmp_path / "base" / "config.json").unlink()
    _refused(tmp_path, r"base: has no config\.json")
    FAMILIES["vit"].make().save_pretrained(tmp_path / "images")
    with pytest.raises(FormatError, match="images: cannot be verified, the model takes pixel_values, wanted token ids"):
        compare_logits(tmp_path / "images", [tmp_path / "adapter"], None, tmp_path / "images")
