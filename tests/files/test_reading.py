"""Adapters of any format are recognised by what lies there: which format, and which files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flashbone.errors import FormatError
from flashbone.files import reading, rwkv
from helpers.adapter_folders import write_adapter

RWKV = {"blocks.0.att.key.disha": torch.ones(4, 8)}


@pytest.fixture
def folder(tmp_path):
    return write_adapter(tmp_path / "a", "bone", {"q": torch.ones(4, 8)})


def test_a_folder_and_each_of_its_files_are_one_adapter(folder):
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    for path in (folder, *files):
        assert reading.recognise(path) == (reading.FORMATS["peft"], folder)
        assert reading.files_of(path) == files
        assert list(reading.read_adapter(path).blocks) == ["q"]


@pytest.mark.parametrize(("kind", "name"), [("BONE", "peft"), ("MISS", "miss"), ("LORA", "lora")])
def test_the_config_says_which_format_a_folder_has(folder, kind, name):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
    assert reading.recognise(folder) == (reading.FORMATS[name], folder)


def test_a_lora_is_refused_with_the_way_out(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(FormatError, match=r"this is a LORA adapter, which flashbone does not merge; PEFT does"):
        reading.read_adapter(folder)


@pytest.mark.parametrize("kind", ["OFT", 3, None, ["BONE"]])
def test_another_method_is_refused_by_name(folder, kind):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(FormatError, match=r"adapter_config.json: (this is a .* adapter|it has no peft_type), wanted"):
        reading.recognise(folder)


def test_a_folder_with_the_one_file_of_a_format_is_that_file(tmp_path):
    torch.save(RWKV, tmp_path / "adapter.pth")
    assert reading.recognise(tmp_path) == (reading.FORMATS["rwkv-peft"], tmp_path / "adapter.pth")
    assert reading.files_of(tmp_path) == [tmp_path / "adapter.pth"]
    assert list(reading.read_adapter(tmp_path).blocks) == ["blocks.0.att.key"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "MISS"}))
    assert reading.recognise(tmp_path) == (reading.FORMATS["miss"], tmp_path)


def test_gguf_is_only_written(tmp_path):
    (tmp_path / "adapter.gguf").touch()
    for path in (tmp_path, tmp_path / "adapter.gguf"):
        with pytest.raises(FormatError, match=r"adapter.gguf: GGUF adapters are only written"):
            reading.recognise(path)


def test_a_folder_without_a_config_is_refused_as_no_adapter(tmp_path):
    assert reading.recognise(tmp_path) == (reading.FORMATS["peft"], tmp_path)
    with pytest.raises(FormatError, match=r"this folder is no adapter, it has no adapter_config.json"):
        reading.read_adapter(tmp_path)


MODEL = {"emb.weight": torch.ones(9, 8), "blocks.0.att.key.weight": torch.ones(8, 8)}


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (MODEL, "model"),
        (RWKV, "adapter"),
        (MODEL | RWKV, "adapter"),
        ({"emb.weight": torch.ones(9, 8)}, ""),
        ({"blocks.0.att.key.weight": torch.ones(8, 8)}, ""),
        ({"model.q.weight": torch.ones(8, 8)}, ""),
    ],
)
def test_a_pth_file_is_a_model_or_an_adapter_by_its_names(tmp_path, state, kind):
    torch.save(state, tmp_path / "f.pth")
    assert reading.rwkv_kind(tmp_path / "f.pth") == kind
    (tmp_path / "f.pth").write_bytes(b"\x80")
    assert reading.rwkv_kind(tmp_path / "f.pth") == ""


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (MODEL, r"is a whole RWKV model, wanted an adapter, whose keys end in \.disha or \.bone"),
        ({}, r"none of its 0 tensors ends in \.disha or \.bone$"),
        ({"a.b": torch.ones(2)}, r"none of its 1 tensors ends in \.disha or \.bone, its names are like 'a\.b'$"),
        (RWKV | {"blocks.1.att.key.bone": torch.ones(4, 8)}, r"it mixes keys that end in bone and disha$"),
        (RWKV | {"q.bone": torch.ones(4, 8)}, r"q\.bone: not a name of an RWKV model"),
        (RWKV | {"blocks.0.ln1.bias": torch.ones(8).int()}, r"ln1\.bias: got torch\.int32, wanted floating"),
        (RWKV | {"blocks.1.att.key.disha": torch.ones(4)}, r"key\.disha: got shape \(4,\), wanted \(r, out\)"),
        (RWKV | {"blocks.1.att.key.disha": torch.ones(2, 4, 3)}, r"got shape \(2, 4, 3\), wanted"),
        (RWKV | {"blocks.1.att.key.disha": torch.ones(0, 4)}, r"got shape \(0, 4\), wanted"),
        (RWKV | {"blocks.1.att.key.disha": torch.ones(2, 4, 4)}, r"blocks of the modes bone and bat, and an adapter"),
    ],
)
def test_what_is_no_adapter_of_rwkv_peft_is_refused_for_what_it_is(tmp_path, state, words):
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(FormatError, match=rf"f\.safetensors: .*{words}"):
        rwkv.read_adapter(tmp_path / "f.safetensors")
