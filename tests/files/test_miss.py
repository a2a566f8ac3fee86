"""MISS folders: PEFT's own are read, ours are loaded by PEFT, and what MISS cannot hold is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from peft import MissConfig, PeftModel, get_peft_model

from flashbone import variants
from flashbone.conversion import convert
from flashbone.errors import FormatError
from flashbone.files import miss, peft
from flashbone.files.adapter import Adapter, same_values
from helpers.adapter_folders import blocks_for, listing, tiny_bert, tiny_llama, write_adapter
from helpers.blocks import random_block
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import MLP

BONE = variants.get("bone")
CASES = [
    {"init_weights": True, "target_modules": ["query", "dense"]},
    {"init_weights": False, "target_modules": "encoder.layer.*.query", "miss_dropout": 0.25},
    {"init_weights": "bat", "target_modules": ["query", "dense"]},
    {"init_weights": "mini", "mini_r": 8, "target_modules": ["query", "output.dense"]},
    {"init_weights": True, "target_modules": ["query"], "bias": "MiSS_only", "layers_to_transform": [1]},
    {"init_weights": "bat", "target_modules": ["query"], "bias": "all"},
    {"init_weights": True, "target_modules": ["query"], "modules_to_save": ["pooler"]},
]


def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same tiny model twice."""
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(tiny_bert(classifier=False))
    return models[0], models[1]


def saved_by_peft(base: torch.nn.Module, fields: dict, folder: Path) -> torch.nn.Module:
    model = get_peft_model(base, MissConfig(r=4, **fields)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) / 4
    model.save_pretrained(folder)
    return model


def output(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(8).view(2, 4)).last_hidden_state.detach()


def write(module, adapter: Adapter, folder: Path) -> Path:
    folder.mkdir()
    module.write(adapter, folder)
    return folder


@pytest.mark.parametrize("fields", CASES)
def test_a_miss_adapter_of_peft_is_the_same_function_as_bone_and_as_miss_again(tmp_path, fields):
    base, fresh = pair()
    want = output(saved_by_peft(base, fields, tmp_path / "miss"))
    assert not close(output(fresh), want)
    adapter = miss.read(tmp_path / "miss")
    bone = write(peft, adapter, tmp_path / "bone")
    live = PeftModel.from_pretrained(fresh, bone).eval()
    assert type(live.base_model).__name__ == "BoneModel"
    assert close(output(live), want)
    write(miss, peft.read(bone), tmp_path / "again")
    theirs = PeftModel.from_pretrained(pair()[0], tmp_path / "again").eval()
    assert type(theirs.base_model).__name__ == "MissModel"
    assert same_bits(output(theirs), want, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("fields", CASES)
def test_miss_to_peft_and_back_is_equal_to_the_bit_and_keeps_its_fields(tmp_path, fields):
    saved_by_peft(pair()[0], fields, tmp_path / "miss")
    bone = write(peft, miss.read(tmp_path / "miss"), tmp_path / "bone")
    write(miss, peft.read(bone), tmp_path / "again")
    first, last = miss.read(tmp_path / "miss"), miss.read(tmp_path / "again")
    assert first.variant == last.variant
    for ours, theirs in ((last.blocks, first.blocks), (last.replacements, first.replacements)):
        assert ours.keys() == theirs.keys()
        assert all(same_values(ours[name], theirs[name]) for name in theirs)
    before, after = (json.loads((tmp_path / n / peft.CONFIG).read_text()) for n in ("miss", "again"))
    assert before.keys() - after.keys() == {"peft_version"}
    lists = ("target_modules", "exclude_modules", "modules_to_save")
    same = {name: before[name] for name in after if name not in lists}
    assert {name: after[name] for name in same} == same
    assert all(sorted(before[name] or ()) == sorted(after[name] or ()) for name in lists)
    assert peft.read(bone).config["dropout"] == fields.get("miss_dropout", 0.0)


@pytest.mark.parametrize("variant", ["bone", "bat-col", "mini"])
def test_what_peft_has_no_word_for_comes_back_from_miss_without_a_config(tmp_path, variant):
    blocks = {"lin0": random_block(variant, 8, 12, 4, mini_r=2)}
    adapter = Adapter(variants.get(variant), blocks, {}, {}, "org/model")
    again = miss.read(write(miss, adapter, tmp_path / "miss"))
    assert (again.variant, again.base_model) == (adapter.variant, "org/model")
    assert same_values(again.blocks["lin0"], blocks["lin0"])
    x = torch.randn(3, 12, dtype=torch.float64)
    write(peft, adapter, tmp_path / "bone")
    got, want = (PeftModel.from_pretrained(MLP((12, 8, 6)), tmp_path / f).eval()(x) for f in ("miss", "bone"))
    assert close(got, want, torch.float32)  # PEFT holds blocks in fp32
    assert not close(got, MLP((12, 8, 6))(x), torch.float32)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (
            Adapter(variants.get("bat-row"), {"q": torch.ones(2, 4, 4)}, {}, {}),
            "bat-row.*convert it to rwkv-peft",
        ),
        (Adapter(variants.get("orthogonal"), {"q": torch.ones(4, 4)}, {}, {}), "orthogonal.*convert it to a LoRA"),
        (
            Adapter(BONE, {"q": torch.ones(4, 8), "k": torch.ones(2, 8)}, {}, {}),
            r"which some do not have \(k\)",
        ),
        (Adapter(BONE, {"e": torch.ones(4, 8)}, {}, {}, transposed=frozenset("e")), r"embeddings are not \(e\)"),
        (Adapter(BONE, {"p": torch.ones(4, 8)}, {}, {}, parameters=frozenset("p")), r"no single parameters \(p\)"),
        (
            Adapter(BONE, {"q": torch.ones(4, 8)}, {"att.decay": torch.ones(8)}, {}),
            r"no single.*\(att\.decay\)",
        ),
        (
            Adapter(variants.get("bat-col"), {"q": torch.ones(2, 4, 4)}, {"q.bias": torch.ones(7)}, {}),
            "q has 7 outputs, a block 4",
        ),
        (Adapter(variants.get("mini"), {"q": torch.ones(4, 3)}, {"q.bias": torch.ones(8)}, {}), "q has 8 outputs"),
        (Adapter(BONE, {"q": torch.ones(4, 8)}, {"a.miss_block": torch.ones(1)}, {}), "no single parameters"),
    ],
)
def test_what_miss_cannot_hold_is_refused_in_one_line_and_nothing_written(tmp_path, adapter, words):
    with pytest.raises(FormatError, match=words) as caught:
        miss.write(adapter, tmp_path)
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == []


def test_all_reasons_are_named_at_once(tmp_path):
    blocks = {"q": torch.ones(4, 4), "k": torch.ones(2, 2)}
    with pytest.raises(FormatError) as caught:
        miss.write(Adapter(variants.get("orthogonal"), blocks, {"w": torch.ones(1)}, {}), tmp_path)
    assert all(word in str(caught.value) for word in ("MISS has bone, mini, bat-col only", "(k)", "(w)"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "BONE"}, "this is a BONE adapter, wanted MISS"),
        ({"init_weights": "batty"}, "init_weights: got 'batty', wanted true, false, 'bat' or 'mini'"),
        ({"init_weights": 1}, "init_weights: got 1"),
        ({"r": "4", "mini_r": 0}, "r: got '4', wanted a positive integer; mini_r: got 0"),
        ({"miss_dropout": 2}, "miss_dropout: got 2"),
        ({"bias": "some"}, "bias: got 'some'"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: got 3, wanted a string or null"),
        ({"target_modules": {"q": 1}}, "target_modules: got {'q': 1}"),
        ({"rank_pattern": {"q": 2}}, "unknown fields, which may change what the adapter does: 'rank_pattern'"),
        ({"mini_r": 2, "init_weights": "mini"}, "miss_block: got shape (4, 16), but adapter_config.json says mini_r=2"),
        ({"init_weights": "bat"}, "a bat-col block has 3 axes"),
    ],
)
def test_bad_fields_of_the_config_are_named(tmp_path, fields, words):
    saved_by_peft(pair()[0], {"target_modules": ["query"]}, tmp_path)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    (tmp_path / peft.CONFIG).write_text(json.dumps(config | fields))
    with pytest.raises(FormatError) as caught:
        miss.read(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], {}, False])
@pytest.mark.parametrize("name", ["rank_pattern", "target_parameters", "parameters_to_save", "of_a_later_version"])
def test_unknown_fields_that_are_off_change_nothing(tmp_path, name, value):
    saved_by_peft(pair()[0], {"target_modules": ["query"], "bias": "all"}, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    adapter = miss.read(tmp_path / "adapter")
    (tmp_path / "adapter" / peft.CONFIG).write_text(json.dumps(config | {name: value}))
    again = miss.read(tmp_path / "adapter")
    assert again.variant == adapter.variant
    assert all(same_values(block, again.blocks[module]) for module, block in adapter.blocks.items())
    for module, form in ((miss, "miss"), (peft, "peft")):
        assert module.read(write(module, again, tmp_path / form)).blocks.keys() == adapter.blocks.keys()


def test_bad_keys_are_named_at_once(tmp_path):
    saved_by_peft(pair()[0], {"target_modules": ["query"]}, tmp_path)
    others = {"q.bone_block": torch.ones(4, 8), "q.bias": torch.ones(8), "k.miss_block": torch.ones(4, 8).int()}
    torch.save({f"{peft.ROOT}{name}": t for name, t in others.items()}, tmp_path / peft.PICKLE)
    (tmp_path / peft.SAFETENSORS).unlink()
    with pytest.raises(FormatError) as caught:
        miss.read(tmp_path)
    assert all(word in str(caught.value) for word in ("q.bone_block", "q.bias", "k.miss_block: got torch.int32"))
    torch.save({}, tmp_path / peft.PICKLE)
    with pytest.raises(FormatError, match="it holds no miss_block"):
        miss.read(tmp_path)


def test_an_r_above_a_layer_s_inputs_is_refused_where_the_base_is_known(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    blocks = blocks_for(model, "bone", ("q_proj", "down_proj"), 24)
    write_adapter(tmp_path / "adapter", "bone", blocks, r=24)
    with pytest.raises(FormatError, match=r"q_proj \(20\).*keep it as BONE"):
        convert(tmp_path / "adapter", tmp_path / "out", "miss", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()
