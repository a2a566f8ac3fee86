"""BONE folders that are written: they read as what was written, and PEFT 0.18.1 and the live model load them."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import flashbone
from flashbone import variants
from flashbone.errors import FlashboneError, FormatError
from flashbone.files import peft
from flashbone.files.adapter import Adapter, same_values
from flashbone.files.fields import by_pattern
from golden.cases import CASES
from helpers import reference
from helpers.adapter_folders import blocks_for, listing, tiny_bert, tiny_llama, write_adapter, write_config
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import MLP, results

TESTS = Path(__file__).parent.parent
GOLDEN = TESTS / "golden" / "peft-0.18.1"


def rewritten(adapter: Adapter, folder: Path) -> Adapter:
    folder.mkdir()
    peft.write(adapter, folder)
    assert listing(folder) == ["adapter_config.json", "adapter_model.safetensors"]
    return peft.read(folder)


def assert_equal(got: Adapter, want: Adapter) -> None:
    assert (got.variant, got.base_model) == (want.variant, want.base_model)
    assert (got.transposed, got.parameters) == (want.transposed, want.parameters)
    for ours, theirs in ((got.blocks, want.blocks), (got.replacements, want.replacements)):
        assert ours.keys() == theirs.keys()
        assert all(same_values(ours[name], theirs[name]) for name in theirs)


def without_config(adapter: Adapter) -> Adapter:
    """As from a format that has none."""
    return replace(adapter, config={})


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("keeps_config", [True, False])
def test_an_adapter_of_each_variant_reads_as_it_was_written(tmp_path, variant, keeps_config):
    blocks = {f"layers.{i}.q": random_block(variant, 8, 12, 4, dtype=torch.bfloat16) for i in range(2)}
    blocks["layers.0.down"] = random_block(variant, 8, 12, 2, dtype=torch.float32)
    fields = {"rank_pattern": {"down": 2}, "base_model_name_or_path": "org/model", "dropout": 0.1}
    fields |= {"orthogonal_eps": 1e-4} if variant == "orthogonal" else {}
    fields |= {"target_modules": ["q", "down"], "task_type": "CAUSAL_LM", "layers_to_transform": [0, 1]}
    adapter = peft.read(write_adapter(tmp_path / "a", variant, blocks, **fields))
    again = rewritten(adapter if keeps_config else without_config(adapter), tmp_path / "b")
    assert_equal(again, adapter)
    if keeps_config:
        assert {name: again.config[name] for name in fields} == fields
    else:
        assert again.config["target_modules"] == sorted(blocks)


@pytest.mark.parametrize("name", CASES)
def test_adapters_of_peft_018_keep_their_fields(tmp_path, name):
    adapter = peft.read(GOLDEN / name)
    again = rewritten(adapter, tmp_path / "again")
    assert_equal(again, adapter)
    before, after = (json.loads((f / peft.CONFIG).read_text()) for f in (GOLDEN / name, tmp_path / "again"))
    assert {field: after[field] for field in before} == before


def test_derived_configs_name_the_blocks_and_no_others(tmp_path):
    """Names that are endings of others, or mean something in a regular expression."""
    blocks = {"q": torch.ones(2, 8), "x.q": torch.ones(4, 8), "y.q": torch.ones(4, 8), "y+.q": torch.ones(3, 8)}
    again = rewritten(Adapter(variants.get("bone"), blocks, {}, {}), tmp_path / "a")
    assert again.config["r"] == 4
    pattern = again.config["rank_pattern"]
    assert {name: by_pattern(name, pattern, 4) for name in (*blocks, "yy.q", "z.x.q")} == {
        **{name: len(block) for name, block in blocks.items()},
        "yy.q": 4,
        "z.x.q": 4,
    }


def test_replacements_without_a_config_are_listed_where_they_belong(tmp_path):
    blocks = {"blocks.0.att.key": torch.ones(4, 8), "blocks.0.ffn.key": torch.ones(4, 8)}
    names = ["blocks.0.ln1.weight", "blocks.0.ln1.bias", "blocks.0.att.time_decay", "blocks.0.att.ln_x.weight"]
    values = {name: torch.randn(8) for name in names} | {"blocks.0.att.key.bias": torch.randn(8)}
    adapter = Adapter(variants.get("bone"), blocks, values, {})
    again = rewritten(adapter, tmp_path / "a")
    assert_equal(again, adapter)
    assert again.config["modules_to_save"] == ["blocks.0.ln1", "blocks.0.att.ln_x"]
    assert again.config["parameters_to_save"] == ["blocks.0.att.time_decay"]
    assert again.config["bias"] == "bone_only"
    assert "base_model.model.blocks.0.att.key.base_layer.bias" in load_file(tmp_path / "a" / peft.SAFETENSORS)


def test_a_module_to_save_around_a_block_is_listed_as_a_parameter(tmp_path):
    """PEFT puts no adapter into modules to save."""
    adapter = Adapter(variants.get("bone"), {"a.b": torch.ones(4, 8)}, {"a.weight": torch.ones(3, 3)}, {})
    again = rewritten(adapter, tmp_path / "a")
    assert (again.config["modules_to_save"], again.config["parameters_to_save"]) == ([], ["a.weight"])


def test_only_listed_parameters_are_read(tmp_path):
    others = {"att.time_decay": torch.ones(8)}
    write_adapter(tmp_path, "bone", {"q": torch.ones(4, 8)}, others=others, parameters_to_save=["att.time_decay"])
    assert list(peft.read(tmp_path).replacements) == ["att.time_decay"]
    write_config(tmp_path, r=4, parameters_to_save=["time_decay"])
    with pytest.raises(FormatError, match=r"unknown key 'base_model\.model\.att\.time_decay'"):
        peft.read(tmp_path)


@pytest.mark.parametrize("name", [name for name in CASES if name != "bone-random-start"])
def test_a_live_model_does_the_same_with_a_golden_adapter_written_again(tmp_path, name):
    """In test_peft_018.py, PEFT 0.18.1 does, too."""
    adapter, sizes = peft.read(GOLDEN / name), CASES[name][0]
    rewritten(adapter if name == "bone-bias" else without_config(adapter), tmp_path / name)
    want = load_file(GOLDEN / name / "expected.safetensors")
    got = results(PeftModel.from_pretrained(MLP(sizes), tmp_path / name, is_trainable=True), sizes[0])
    assert got.keys() == want.keys()
    assert all(close(got[key], want[key]) for key in want)


def test_a_live_model_that_cannot_take_single_parameters_points_to_the_merge(tmp_path):
    fields = {"target_modules": ["lin0"], "parameters_to_save": ["lin1.weight"]}
    write_adapter(tmp_path, "bone", {"lin0": torch.zeros(4, 8)}, others={"lin1.weight": torch.randn(6, 8)}, **fields)
    with pytest.raises(FlashboneError, match=r"no parameter 'lin1.weight' of this MLP .* flashbone merge takes files"):
        PeftModel.from_pretrained(MLP((12, 8, 6)), tmp_path)


def test_an_adapter_with_single_parameters_is_merged_into_a_checkpoint(tmp_path):
    W, decay = torch.randn(8, 8), torch.randn(1, 1, 8)
    (tmp_path / "base").mkdir()
    save_file({"att.key.weight": W, "att.time_decay": torch.zeros(1, 1, 8)}, tmp_path / "base" / "model.safetensors")
    adapter = Adapter(variants.get("bat-row"), {"att.key": torch.randn(2, 4, 4)}, {"att.time_decay": decay}, {})
    rewritten(adapter, tmp_path / "adapter")
    flashbone.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert same_bits(merged["att.time_decay"], decay, Promise.STORED)
    assert close(merged["att.key.weight"], W + reference.delta("bat-row", W, adapter.blocks["att.key"]), torch.float32)


def _trained(base: torch.nn.Module, config: flashbone.BoneConfig, folder: Path) -> torch.nn.Module:
    model = get_peft_model(base, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) / 3
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
        {"target_modules": ["query", "word_embeddings"], "bias": "bone_only"},
        {"target_modules": ["output.dense"], "modules_to_save": ["pooler"], "variant": "bat-row"},
    ],
)
@pytest.mark.parametrize("keeps_config", [True, False])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_live_model_loads_what_is_written(tmp_path, fields, keeps_config):
    torch.manual_seed(1)
    base = tiny_bert(classifier="task_type" in fields)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    ids = torch.arange(6).view(2, 3)
    want = _trained(base, flashbone.BoneConfig(r=4, **fields), tmp_path / "a")(ids)[0]
    adapter = peft.read(tmp_path / "a")
    rewritten(adapter if keeps_config else without_config(adapter), tmp_path / "b")
    fresh = tiny_bert(classifier="task_type" in fields)
    fresh.load_state_dict(state)
    assert same_bits(PeftModel.from_pretrained(fresh, tmp_path / "b").eval()(ids)[0], want, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("keeps_config", [True, False])
def test_biases_inside_a_module_with_an_adapted_parameter_load_again(tmp_path, keeps_config):
    torch.manual_seed(1)
    base = torch.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
    fresh, x = copy.deepcopy(base), torch.randn(3, 1, 8)
    targets = {"target_modules": ["out_proj", "linear1"], "target_parameters": ["self_attn.in_proj_weight"]}
    want = _trained(base, flashbone.BoneConfig(r=4, bias="all", **targets), tmp_path / "a")(x)
    adapter = peft.read(tmp_path / "a")
    assert adapter.parameters == {"self_attn.in_proj_weight"}
    assert "self_attn.out_proj.bias" in adapter.replacements
    rewritten(adapter if keeps_config else without_config(adapter), tmp_path / "b")
    assert same_bits(PeftModel.from_pretrained(fresh, tmp_path / "b").eval()(x), want, Promise.SAME_PRODUCT)


def test_pickled_tensors_that_share_memory_are_written_apart(tmp_path):
    whole = torch.randn(8, 8)
    write_adapter(tmp_path / "a", "bone", {"q": whole})
    (tmp_path / "a" / peft.SAFETENSORS).unlink()
    shared = {"q": whole[:4], "k": whole[:4], "v": whole.mT[:4]}
    write_config(tmp_path / "a", r=4)
    torch.save({f"{peft.ROOT}{n}.bone_block": t for n, t in shared.items()}, tmp_path / "a" / peft.PICKLE)
    again = rewritten(peft.read(tmp_path / "a"), tmp_path / "b")
    assert all(same_bits(again.blocks[name], tensor, Promise.STORED) for name, tensor in shared.items())


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (Adapter(variants.get("mini"), {"q": torch.ones(4, 2), "k": torch.ones(4, 3)}, {}, {}), "2, 3 columns"),
        (
            Adapter(variants.get("bone"), {"q": torch.ones(4, 8).to(torch.float8_e5m2)}, {}, {}),
            "float8_e5m2, wanted fp64",
        ),
        (Adapter(variants.get("bone"), {"q": torch.ones(4, 8)}, {"a.base_layer.b": torch.ones(1)}, {}), "unknown key"),
        (Adapter(variants.get("bone"), {"q": torch.ones(4, 8)}, {"a.bone_block": torch.ones(1)}, {}), "2 axes"),
    ],
)
def test_what_a_folder_cannot_hold_is_refused_and_nothing_written(tmp_path, adapter, words):
    with pytest.raises(FormatError, match=words) as caught:
        peft.write(adapter, tmp_path)
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == []


def test_every_field_of_the_config_class_is_known(tmp_path):
    """Of ours, and of PEFT 0.18.1's, whose configs the golden folders have."""
    tiny = get_peft_model(tiny_llama(), flashbone.BoneConfig(r=4, target_modules=["q_proj"]))
    tiny.save_pretrained(tmp_path / "a")
    assert peft.read(tmp_path / "a").config.keys() >= json.loads((tmp_path / "a" / peft.CONFIG).read_text()).keys()
    shutil.copytree(GOLDEN / "bone", tmp_path / "b")
    config = json.loads((tmp_path / "b" / peft.CONFIG).read_text())
    (tmp_path / "b" / peft.CONFIG).write_text(json.dumps(config | {"alpha": 2, "off": None, "none": []}))
    with pytest.raises(FormatError, match="unknown fields, which may change what the adapter does: 'alpha': 2; was it"):
        peft.read(tmp_path / "b")


def test_blocks_of_a_tiny_model_have_the_names_that_it_uses(tmp_path):
    blocks = blocks_for(tiny_llama(), "bone", ("q_proj", "down_proj"), 6)
    rewritten(Adapter(variants.get("bone"), blocks, {}, {}), tmp_path / "a")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    got = {n: p for n, p in model.named_parameters() if "bone_block" in n}
    assert len(got) == len(blocks) == 4
    assert all(same_bits(got[f"base_model.model.{n}.bone_block.default"], b, Promise.STORED) for n, b in blocks.items())
