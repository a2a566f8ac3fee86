"""PEFT's adapter folders: what is read, and what is refused by name."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from flashbone import variants
from flashbone.errors import FormatError
from flashbone.files import peft
from helpers.adapter_folders import ROOT, write_adapter, write_config
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import Promise, same_bits


def _block(variant: str, out: int = 8, in_: int = 8, r: int = 4) -> torch.Tensor:
    return random_block(variant, out, in_, r, dtype=torch.float32)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_our_folders_name_their_variant(tmp_path, variant):
    blocks = {"layers.0.q": _block(variant), "layers.1.q": _block(variant)}
    adapter = peft.read(write_adapter(tmp_path, variant, blocks, base_model_name_or_path="org/model"))
    assert adapter.variant.name == variant
    assert adapter.base_model == "org/model"
    assert list(adapter.blocks) == list(blocks)
    assert all(same_bits(adapter.blocks[name], block, Promise.STORED) for name, block in blocks.items())
    assert not adapter.replacements


@pytest.mark.parametrize(("init_weights", "variant"), [(True, "bone"), (False, "bone"), ("bat", "bat-col")])
def test_the_variant_of_old_peft_folders_is_in_init_weights(tmp_path, init_weights, variant):
    write_adapter(tmp_path, variant, {"q": _block(variant)})
    write_config(tmp_path, r=4, init_weights=init_weights, mini_r=None)
    assert peft.read(tmp_path).variant.name == variant


def test_layouts_are_told_apart_by_the_config_where_shapes_are_equal(tmp_path):
    block = _block("bat-col")
    assert peft.read(write_adapter(tmp_path / "a", "bat-col", {"q": block})).variant.name == "bat-col"
    assert peft.read(write_adapter(tmp_path / "b", "bat-row", {"q": block})).variant.name == "bat-row"


def test_pickled_folders_read_like_safetensors(tmp_path):
    write_adapter(tmp_path, "bone", {"q": _block("bone")})
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    want = peft.read(tmp_path)
    weights.unlink()
    got = peft.read(tmp_path)
    assert same_bits(got.blocks["q"], want.blocks["q"], Promise.STORED)


def test_blocks_keep_the_dtype_of_the_file(tmp_path):
    adapter = peft.read(write_adapter(tmp_path, "bone", {"q": _block("bone").bfloat16()}))
    assert adapter.blocks["q"].dtype == torch.bfloat16


def test_rank_pattern_gives_single_modules_their_own_r(tmp_path):
    blocks = {
        "layers.0.q": _block("bone", r=2),
        "layers.1.q": _block("bone"),
        "layers.0.down_proj": _block("bone", r=3),
    }
    pattern = {"layers.0.q": 2, "d.*_proj": 3}
    assert len(peft.read(write_adapter(tmp_path, "bone", blocks, rank_pattern=pattern)).blocks) == 3


def test_biases_are_replacements_under_the_names_of_the_bare_model(tmp_path):
    others = {"q.base_layer.bias": torch.ones(8), "norm.bias": torch.ones(3)}
    adapter = peft.read(write_adapter(tmp_path, "bone", {"q": _block("bone")}, others=others, bias="all"))
    assert set(adapter.replacements) == {"q.bias", "norm.bias"}


def test_modules_to_save_are_replacements_without_the_names_of_wrappers(tmp_path):
    """What PEFT 0.21 writes for a classifier with bias="all": the trained bias twice, and that of the frozen twin."""
    trained = torch.ones(2)
    others = {
        "classifier.weight": torch.ones(2, 8),
        "classifier.bias": trained,
        "classifier.modules_to_save.bias": trained.clone(),
        "classifier.original_module.bias": torch.zeros(2),
        "head.dense.weight": torch.ones(8, 8),
        "head.modules_to_save.dense.bias": torch.ones(8),
        "head.original_module.dense.bias": torch.zeros(8),
    }
    fields = {"bias": "all", "modules_to_save": ["classifier", "head"]}
    adapter = peft.read(write_adapter(tmp_path, "bone", {"q": _block("bone")}, others=others, **fields))
    assert set(adapter.replacements) == {"classifier.weight", "classifier.bias", "head.dense.weight", "head.dense.bias"}
    assert same_bits(adapter.replacements["classifier.bias"], trained, Promise.STORED)
    assert same_bits(adapter.replacements["head.dense.bias"], torch.ones(8), Promise.STORED)


def test_two_values_for_one_parameter_are_refused(tmp_path):
    others = {"c.bias": torch.ones(2), "c.modules_to_save.bias": torch.zeros(2)}
    write_adapter(tmp_path, "bone", {"q": _block("bone")}, others=others, bias="all", modules_to_save=["c"])
    with pytest.raises(FormatError, match=r"two different values of c\.bias"):
        peft.read(tmp_path)


def test_every_bad_key_is_named_in_one_error(tmp_path):
    blocks = {
        "flat": torch.ones(4),
        "empty": torch.ones(4, 0),
        "integers": torch.ones(4, 8, dtype=torch.int32),
        "other_r": torch.ones(5, 8),
        "good": torch.ones(4, 8),
    }
    others = {"q.lora_A.weight": torch.ones(1), "q.bias": torch.ones(8), "q.weight": torch.ones(8, 8)}
    write_adapter(tmp_path, "bone", blocks, others=others)
    with pytest.raises(FormatError) as caught:
        peft.read(tmp_path)
    message = str(caught.value)
    for name in ("flat", "empty", "integers", "other_r", "q.lora_A.weight", "q.bias", "q.weight"):
        assert name in message
    assert "good" not in message
    assert "r=4" in message
    assert "torch.int32" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("variant", "block", "words"),
    [
        ("bat-col", torch.ones(2, 4, 3), "r=4"),
        ("bat-row", torch.ones(2, 3, 4), "r=4"),
        ("bat-row", torch.ones(4, 8), "3 axes"),
        ("bone", torch.ones(2, 4, 4), "2 axes"),
        ("mini", torch.ones(4, 2), "mini_r=3"),
    ],
)
def test_blocks_that_contradict_the_config_are_refused(tmp_path, variant, block, words):
    with pytest.raises(FormatError, match=words):
        peft.read(write_adapter(tmp_path, variant, {"layers.0.q": block}))


def test_keys_outside_of_the_model_are_refused(tmp_path):
    write_adapter(tmp_path, "bone", {})
    torch.save({"q.bone_block": torch.ones(4, 8)}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"unknown key 'q\.bone_block'"):
        peft.read(tmp_path)


def test_an_adapter_without_blocks_is_refused(tmp_path):
    with pytest.raises(FormatError, match="no bone_block"):
        peft.read(write_adapter(tmp_path, "bone", {}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LORA"}, "this is a LORA adapter, wanted BONE"),
        ({"variant": "orthogonal-2"}, "variant: got 'orthogonal-2', wanted one of 'bone'"),
        ({"variant": "bat-row", "init_weights": "bat"}, "means the variant 'bat-col', but variant is 'bat-row'"),
        ({"r": 0}, "r: got 0"),
        ({"r": "8"}, "r: got '8'"),
        ({"bias": "some", "mini_r": -1}, "mini_r: got -1, wanted a positive integer; bias: got 'some'"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern"),
        ({"rank_pattern": [4]}, "rank_pattern"),
        ({"modules_to_save": "head"}, "modules_to_save"),
    ],
)
def test_bad_fields_of_the_config_are_named(tmp_path, fields, words):
    write_adapter(tmp_path, "bone", {"q": _block("bone")})
    write_config(tmp_path, **({"r": 4, "variant": "bone"} | fields))
    with pytest.raises(FormatError) as caught:
        peft.read(tmp_path)
    assert words in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    write_adapter(tmp_path, "bone", {"q": _block("bone")})
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError, match=r"adapter_config\.json: (not valid JSON|wanted a JSON object)"):
        peft.read(tmp_path)


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(FormatError, match="no such adapter folder"):
        peft.read(tmp_path / "nowhere")
    file = tmp_path / "adapter_model.safetensors"
    file.touch()
    with pytest.raises(FormatError, match="is a file, wanted the adapter's folder"):
        peft.read(file)
    with pytest.raises(FormatError, match=r"no adapter, it has no adapter_config\.json"):
        peft.read(tmp_path)
    write_config(tmp_path, r=4)
    file.unlink()
    with pytest.raises(FormatError, match=r"no weights, wanted adapter_model\.safetensors or adapter_model\.bin"):
        peft.read(tmp_path)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    write_adapter(tmp_path, "bone", {"q": _block("bone")})
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in (0, 3, 8, 20, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(FormatError, match="truncated"):
            peft.read(tmp_path)


class _Intruder:
    """A pickle that would write a file when loaded."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self):
        return open, (self.trace, "w")


@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, 2))])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, save):
    trace = tmp_path / "trace"
    write_config(tmp_path, r=4)
    save({f"{ROOT}q.bone_block": _Intruder(str(trace))}, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model\.bin: (refused, its pickle asks for|not a whole torch file)"):
        peft.read(tmp_path)
    assert not trace.exists()


def test_a_truncated_pickle_is_refused(tmp_path):
    write_config(tmp_path, r=4)
    file = tmp_path / "adapter_model.bin"
    torch.save({f"{ROOT}q.bone_block": torch.ones(4, 8)}, file)
    whole = file.read_bytes()
    for size in (0, 10, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"adapter_model\.bin"):
            peft.read(tmp_path)


@pytest.mark.parametrize("content", [[torch.ones(4, 8)], {f"{ROOT}q.bone_block": 3}])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    write_config(tmp_path, r=4)
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match="wanted a dict of tensors by name"):
        peft.read(tmp_path)


def test_defaults_are_those_of_the_config_class(tmp_path):
    write_adapter(tmp_path, "bone", {"q": _block("bone", r=64)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "BONE"}))
    adapter = peft.read(tmp_path)
    assert adapter.variant == variants.get("bone")
    assert adapter.base_model is None
