"""Other dtypes, other shards, merge.json, and the check before the result appears."""

import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flashbone.errors import ConfigError, FormatError, NonFiniteError
from flashbone.merge import layout, merge_checkpoint
from helpers.adapter_folders import blocks_for, listing, tiny_llama, write_adapter
from helpers.comparison import Promise, same_bits

DTYPES = {"bf16": torch.bfloat16, "float16": torch.float16, "fp32": torch.float32}


@pytest.fixture
def place(tmp_path):
    base = tiny_llama().bfloat16()
    base.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    write_adapter(tmp_path / "adapter", "bat-row", blocks_for(base, "bat-row", ("q_proj", "down_proj"), 4))
    return tmp_path


def _state(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def _digest(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_size", [None, "8KB", "1GB"])
def test_every_tensor_is_rounded_once_to_the_dtype(place, dtype, shard_size):
    merge_checkpoint(place / "base", place / "adapter", place / "wide", dtype="fp32")
    wide, base = _state(place / "wide"), _state(place / "base")
    merge_checkpoint(place / "base", place / "adapter", place / "out", dtype=dtype, shard_size=shard_size)
    got = _state(place / "out")
    assert [n for n in base if not same_bits(got[n], wide[n].to(DTYPES[dtype]), Promise.SAME_PRODUCT)] == []
    assert [n for n in base if not torch.equal(wide[n], base[n].float())] == [
        n for n in base if "q_proj" in n or "down_proj" in n
    ]
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["dtype"] == str(DTYPES[dtype]).removeprefix("torch.")
    loaded = AutoModelForCausalLM.from_pretrained(place / "out", dtype="auto")
    assert loaded.dtype == DTYPES[dtype]
    assert [n for n, t in loaded.state_dict().items() if n in got and not same_bits(t, got[n], Promise.STORED)] == []


def test_parts_of_the_config_follow_the_dtype_and_nothing_else_does():
    config = {
        "torch_dtype": "bfloat16",
        "a": {"dtype": "float32", "b": {"dtype": "auto"}},
        "c": ["bfloat16"],
        "dtype": None,
    }
    want = {
        "torch_dtype": "float16",
        "a": {"dtype": "float16", "b": {"dtype": "auto"}},
        "c": ["bfloat16"],
        "dtype": None,
    }
    assert layout.config_in(config, "F16") == want


@pytest.mark.parametrize("size", ["1B", "700B", "8KB", "5GB", "2GiB", 4096])
def test_shards_are_no_larger_than_asked_for_unless_they_hold_one_tensor(place, size):
    merge_checkpoint(place / "base", place / "adapter", place / "out", shard_size=size)
    merge_checkpoint(place / "base", place / "adapter", place / "same")
    files = sorted((place / "out").glob("*.safetensors"))
    limit = layout.shard_bytes(size)
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    got, want = _state(place / "out"), _state(place / "same")
    assert got.keys() == want.keys()
    assert all(same_bits(got[n], want[n], Promise.SAME_PRODUCT) for n in want)
    if len(files) == 1:
        assert [f.name for f in files] == ["model.safetensors"]
        assert not (place / "out" / "model.safetensors.index.json").exists()
    else:
        assert files[1].name == f"model-00002-of-{len(files):05}.safetensors"
        index = json.loads((place / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == got.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in got.values())
    AutoModelForCausalLM.from_pretrained(place / "out")


@pytest.mark.parametrize(("size", "count"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("2mb", 2 * 10**6), (7, 7)])
def test_sizes_have_units(size, count):
    assert layout.shard_bytes(size) == count


def test_tensors_of_mixed_widths_can_be_mapped(tmp_path):
    (tmp_path / "base").mkdir()
    state = {
        "odd": torch.randn(3).half(),
        "ids": torch.arange(3),
        "flag": torch.tensor([True]),
        "a.weight": torch.randn(4, 4),
    }
    save_file(state, tmp_path / "base" / "model.safetensors")
    write_adapter(tmp_path / "adapter", "bone", {"a": torch.randn(4, 4)})
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bf16", shard_size="1GB")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert same_bits(got["odd"], state["odd"].bfloat16(), Promise.EXACT)
    assert same_bits(got["ids"], state["ids"], Promise.STORED)


def test_numbers_beyond_the_dtype_are_refused_by_name(place):
    before = listing(place)
    state = load_file(sorted((place / "base").glob("*.safetensors"))[0])
    name = next(n for n in state if "q_proj" not in n and "down_proj" not in n)
    state[name].view(-1)[3] = 1e5
    save_file(state, sorted((place / "base").glob("*.safetensors"))[0], {"format": "pt"})
    with pytest.raises(NonFiniteError, match=rf"{name}: it holds 9.98e\+04, .*float16 is 6.55e\+04"):
        merge_checkpoint(place / "base", place / "adapter", place / "out", dtype="fp16")
    assert listing(place) == before
    merge_checkpoint(place / "base", place / "adapter", place / "out", dtype="fp32")


def test_a_dtype_for_quantised_tensors_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    state = {"a.weight": torch.randn(4, 4), "small": torch.ones(2).to(torch.float8_e4m3fn)}
    save_file(state, tmp_path / "base" / "model.safetensors")
    write_adapter(tmp_path / "adapter", "bone", {"a": torch.randn(4, 4)})
    with pytest.raises(FormatError, match=r"it is quantised: small \(F8_E4M3\)"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bf16")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", shard_size="1GB")


@pytest.mark.parametrize("fields", [{}, {"dtype": "fp32"}, {"shard_size": "3KB"}], ids=str)
def test_the_record_holds_the_hashes_of_all_that_went_in(place, fields):
    report = merge_checkpoint(place / "base", place / "adapter", place / "out", weights=[0.5], **fields)
    record = json.loads((place / "out" / "merge.json").read_text())
    assert record == report.record
    assert {f["name"] for f in record["base"]["files"]} == set(listing(place / "base"))
    for file in record["base"]["files"]:
        path = place / "base" / file["name"]
        assert (file["bytes"], file["sha256"]) == (path.stat().st_size, _digest(path)), file["name"]
    (adapter,) = record["adapters"]
    assert (adapter["variant"], adapter["r"], adapter["weight"]) == ("bat-row", 4, 0.5)
    for file in adapter["files"]:
        assert file["sha256"] == _digest(place / "adapter" / file["name"])
    base = _state(place / "base")
    assert len(record["tensors"]) == (len(base) if "dtype" in fields else 4)
    for name, tensor in record["tensors"].items():
        change = "merged" if "_proj" in name and ("q_" in name or "down_" in name) else "converted"
        assert tensor == {"change": change, "dtype": "BF16"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"models": []}', "flashbone did not write this, it lacks flashbone, base, adapters, dtype, tensors, base_r"),
        ("[]", "wanted a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_foreign_merge_json_is_refused(place, text, reason):
    (place / "base" / "merge.json").write_text(text)
    with pytest.raises(FormatError, match=rf"merge.json: {reason}"):
        merge_checkpoint(place / "base", place / "adapter", place / "out")
    assert not (place / "out").exists()


def test_the_check_sees_the_finished_folder_and_can_refuse_it(place):
    seen = []

    def check(folder):
        seen.append(listing(folder))
        AutoModelForCausalLM.from_pretrained(folder)
        if len(seen) == 1:
            raise ArithmeticError

    before = listing(place)
    with pytest.raises(ArithmeticError):
        merge_checkpoint(place / "base", place / "adapter", place / "out", check=check)
    assert listing(place) == before
    merge_checkpoint(place / "base", place / "adapter", place / "out", check=check)
    assert seen == [listing(place / "out")] * 2


def test_a_merged_base_hands_its_record_on(place):
    merge_checkpoint(place / "base", place / "adapter", place / "once", dtype="fp32")
    merge_checkpoint(place / "once", place / "adapter", place / "twice")
    record = json.loads((place / "twice" / "merge.json").read_text())
    assert record["base_record"] == json.loads((place / "once" / "merge.json").read_text())


def test_a_record_of_an_older_version_is_handed_on_whole(place):
    merge_checkpoint(place / "base", place / "adapter", place / "once")
    older = json.loads((place / "once" / "merge.json").read_text()) | {"result": {}, "base_config": None}
    (place / "once" / "merge.json").write_text(json.dumps(older))
    record = merge_checkpoint(place / "once", place / "adapter", place / "twice").record
    assert record["base_record"] == older


def test_a_base_whose_name_is_no_unicode_is_recorded(place):
    name = os.fsdecode(b"caf\xe9")
    base = (place / "base").rename(place / name)
    (base / name).write_text("companion")
    merge_checkpoint(base, place / "adapter", place / "out")
    record = json.loads((place / "out" / "merge.json").read_text(encoding="utf-8"))["base"]
    assert record["name"] == str(base)
    assert name in [file["name"] for file in record["files"]]


@pytest.mark.parametrize("weight", [3.5e38, -1e300, 10**400, float("nan"), float("inf")])
def test_weights_beyond_float32_are_refused(place, weight):
    with pytest.raises(ConfigError, match=r"weights: got .* wanted finite numbers in the range of float32"):
        merge_checkpoint(place / "base", place / "adapter", place / "out", weights=[weight])
    assert not (place / "out").exists()


@pytest.mark.parametrize("size", ["9" * 400, "9" * 305 + "TB", "0.5B", "0", True, "-1GB", "GB", "", "1e400GB"])
def test_invalid_sizes_are_refused(size):
    with pytest.raises(ConfigError, match=r"shard size: got .* wanted a positive number"):
        layout.shard_bytes(size)


def test_a_folder_that_is_a_link_in_the_base_is_refused_by_name(place, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (place / "base" / "extra").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(FormatError, match=r"base: links to folders: extra; a merge does not follow them"):
        merge_checkpoint(place / "base", place / "adapter", place / "out")
    assert not (place / "out").exists()


def test_a_link_to_nothing_in_the_base_is_refused_by_name(place):
    (place / "base" / "README.md").symlink_to(place / "gone")
    with pytest.raises(FormatError, match=r"base: not regular files, or broken links: README.md; "):
        merge_checkpoint(place / "base", place / "adapter", place / "out")
    assert not (place / "out").exists()


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", "tokenizer.json"])
def test_a_link_that_leads_out_of_the_base_is_refused_and_one_inside_is_copied(place, name):
    (place / "secret").write_text("secret")
    link = place / "base" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(place / "secret")
    with pytest.raises(FormatError, match=rf"base: links that lead out of the folder: {name}; "):
        merge_checkpoint(place / "base", place / "adapter", place / "out")
    assert not (place / "out").exists()
    link.unlink()
    link.symlink_to(place / "base/config.json")
    merge_checkpoint(place / "base", place / "adapter", place / "out")
    assert (place / "out" / name).read_text() == (place / "base/config.json").read_text()
