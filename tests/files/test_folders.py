"""What all adapter folders of PEFT share: how keys name tensors, which fields list them, and what is written back."""

import json

import pytest
import torch

from flashbone import variants
from flashbone.errors import FormatError
from flashbone.files import blocks, miss, peft, rwkv
from flashbone.files.adapter import Adapter
from helpers.adapter_folders import ROOT, listing, write_adapter

BONE, BLOCK = variants.get("bone"), torch.ones(4, 8)


def test_a_block_may_be_of_a_weight_or_of_a_transposed_one_but_not_of_both(tmp_path):
    write_adapter(tmp_path, "bone", {"q": BLOCK}, others={"e.bone_transposed": BLOCK.clone()})
    adapter = peft.read(tmp_path)
    assert (set(adapter.blocks), adapter.transposed) == ({"q", "e"}, frozenset("e"))
    write_adapter(tmp_path, "bone", {"q": BLOCK}, others={"q.bone_transposed": BLOCK.clone()})
    with pytest.raises(FormatError, match="q: the file holds two blocks of it"):
        peft.read(tmp_path)


def test_miss_has_no_blocks_of_transposed_weights(tmp_path):
    write_adapter(tmp_path, "bone", {}, others={"q.miss_block": BLOCK, "e.bone_transposed": BLOCK.clone()})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "MISS", "r": 4}))
    with pytest.raises(FormatError, match=rf"unknown key '{ROOT}e.bone_transposed'"):
        miss.read(tmp_path)


@pytest.mark.parametrize(
    ("replacements", "bias", "saved", "single"),
    [
        ({}, "none", None, None),
        ({"q.bias": BLOCK[0]}, "bone_only", None, None),
        ({"k.bias": BLOCK[0]}, "all", None, None),
        ({"q.bias": BLOCK[0], "k.bias": BLOCK[0]}, "all", None, None),
        ({"head.weight": BLOCK, "head.bias": BLOCK[0]}, "none", ["head"], None),
        ({"lm_head.weight": BLOCK}, "none", None, None),  # PEFT keeps embeddings without saying so
        ({"norm.scale": BLOCK[0]}, "none", None, ["norm.scale"]),
        ({"q.weight": BLOCK}, "none", None, ["q.weight"]),  # as a module to save it would shut the block out
    ],
)
def test_what_is_saved_whole_is_listed_where_it_belongs(replacements, bias, saved, single):
    config = peft.FOLDER.config(Adapter(BONE, {"q": BLOCK}, replacements, {}))
    assert (config["bias"], config["modules_to_save"], config["parameters_to_save"]) == (bias, saved, single)


@pytest.mark.parametrize("write", [peft.write, miss.write])
def test_names_that_would_be_read_as_others_are_refused_and_nothing_written(tmp_path, write):
    adapter = Adapter(BONE, {"q": BLOCK}, {"head.modules_to_save.bias": BLOCK[0]}, {})
    with pytest.raises(
        FormatError, match=r"names of this adapter would mean something else in a .* folder; rename its"
    ):
        write(adapter, tmp_path)
    assert listing(tmp_path) == []


def test_values_that_would_be_read_as_blocks_of_rwkv_are_refused_and_nothing_written(tmp_path):
    adapter = Adapter(BONE, {"blocks.0.att.key": BLOCK}, {"blocks.0.att.value.disha": BLOCK}, {})
    with pytest.raises(FormatError, match="would mean something else in a file of RWKV-PEFT; rename its layers"):
        rwkv.write(adapter, tmp_path / "adapter.pth")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(("write", "kind"), [(peft.write, "BONE"), (miss.write, "MISS")])
def test_a_config_of_the_same_method_keeps_its_other_fields(tmp_path, write, kind):
    for own, version in ((kind, "0.17.0"), ("LORA", None)):
        adapter = Adapter(BONE, {"q": BLOCK}, {}, {"peft_type": own, "peft_version": "0.17.0", "r": 4})
        write(adapter, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text()).get("peft_version") == version


@pytest.mark.parametrize(("size", "r", "kept"), [(4, 4, 4), (8, 8, None), (None, 4, None)])
def test_a_bottleneck_size_is_kept_where_it_is_still_r(tmp_path, size, r, kept):
    config = {"peft_type": "BONE", "bottleneck_size": size, "r": r}
    peft.write(Adapter(variants.get("orthogonal"), {"q": torch.ones(4, 4)}, {}, config), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written.get("bottleneck_size"), written["r"]) == (kept, 4)
    peft.write(Adapter(BONE, {"q": BLOCK}, {}, config | {"bottleneck_size": 4, "r": 4}), tmp_path)
    assert "bottleneck_size" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert peft.read(tmp_path).variant == BONE


def test_a_refusal_names_five_and_says_how_many_more(tmp_path):
    many = dict.fromkeys("abcdefg", BLOCK)
    for count, words in ((5, "(a, b, c, d, e)"), (6, "(a, b, c, d, e and 1 more)"), (7, "(a, b, c, d, e and 2 more)")):
        names = frozenset("abcdefg"[:count])
        with pytest.raises(FormatError) as caught:
            blocks.refuse(Adapter(BONE, many, {}, {}), {"why": sorted(names), "never": []}, "X")
        assert str(caught.value) == f"this bone adapter cannot be written as X: why {words}"
    blocks.refuse(Adapter(BONE, many, {}, {}), {"never": [], "no": False}, "X")
