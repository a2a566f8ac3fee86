"""`unmerge_checkpoint`: the base again, proved by merge.json; or an honest word on how far it is."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashbone import merge_checkpoint, unmerge_checkpoint
from flashbone.cli import main
from flashbone.errors import FlashboneError, FormatError
from helpers.adapter_folders import listing, write_adapter
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import Promise, same_bits

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {"a": (12, 10), "b": (7, 9), "c": (8, 8)}


def _base(folder, dtype=torch.bfloat16):
    """Three layers of which two will be adapted, a norm, and integers."""
    folder.mkdir()
    state = {f"{name}.weight": (torch.randn(*size) / 4).to(dtype) for name, size in SIZES.items()}
    state |= {"norm.weight": torch.ones(8).to(dtype), "ids": torch.arange(5)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"torch_dtype": str(dtype)[6:], "text_config": {"dtype": "auto"}}))
    return state


def _adapter(folder, variant, *, std=0.3, r=4, others=None, **fields):
    blocks = {n: random_block(variant, *SIZES[n], r, dtype=torch.float32, std=std) for n in ("a", "b")}
    return write_adapter(folder, variant, blocks, r=r, others=others, **fields)


def _state(folder):
    return load_file(folder / "model.safetensors")


def _truth(got, want) -> tuple[float, float]:
    """Largest error, and relative RMS, over the adapted layers."""
    off = torch.cat([(got[f"{n}.weight"].double() - want[f"{n}.weight"].double()).flatten() for n in ("a", "b")])
    base = torch.cat([want[f"{n}.weight"].double().flatten() for n in ("a", "b")])
    return float(off.abs().max()), float(off.norm() / base.norm())


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_what_was_not_rounded_comes_back_byte_for_byte_and_is_proved(tmp_path, variant):
    _base(tmp_path / "base")
    _adapter(tmp_path / "adapter", variant)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype="fp32", weights=[0.7])
    report = unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back")
    assert (report.is_proved, report.proved, report.computed, report.converted) == (True, 4, 2, 2)
    assert (report.max_abs_error, report.relative_rms_error, report.is_measured) == (0, 0, True)
    assert listing(tmp_path / "back") == listing(tmp_path / "base")
    for name in listing(tmp_path / "base"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "base" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merged", [None, "bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_the_error_is_under_the_bound_and_near_it(tmp_path, variant, dtype, merged):
    want = _base(tmp_path / "base", DTYPES[dtype])
    _adapter(tmp_path / "adapter", variant)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=merged)
    at_most = unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back")
    measured = unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "2", base=tmp_path / "base")
    got = _state(tmp_path / "back")
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
    largest, rms = _truth(got, want)
    assert measured.max_abs_error == largest or merged
    assert at_most.is_measured == at_most.is_proved
    assert largest <= at_most.max_abs_error
    assert rms <= at_most.relative_rms_error or merged
    assert measured.relative_rms_error <= at_most.relative_rms_error
    if rms and (dtype, merged) != ("bf16", "fp16"):  # where a few entries are lost at most, and luck says which
        assert at_most.relative_rms_error < 100 * measured.relative_rms_error
    assert same_bits(got["ids"], want["ids"], Promise.STORED)


def test_a_live_merge_without_a_record_is_taken_back_without_proof(tmp_path, capsys):
    want = _base(tmp_path / "base")
    _adapter(tmp_path / "adapter", "bat-row", std=0.1)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "merged" / "merge.json").unlink()
    assert main(["unmerge", *(str(tmp_path / n) for n in ("merged", "adapter", "back")), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["is_proved"], report["is_measured"], report["proved"]) == (False, False, 0)
    largest, rms = _truth(_state(tmp_path / "back"), want)
    assert 0 < largest <= report["max_abs_error"]
    assert 0 < rms <= report["relative_rms_error"] < 0.1
    assert main(["unmerge", *(str(tmp_path / n) for n in ("merged", "adapter", "2"))]) == 0
    assert "cannot be proved, and differ from the base by at most" in capsys.readouterr().out


def test_several_adapters_come_out_with_the_weights_of_the_record(tmp_path):
    want = _base(tmp_path / "base")
    names = [_adapter(tmp_path / name, name, std=0.1) for name in ("bone", "bat-row", "mini")]
    merge_checkpoint(tmp_path / "base", names, tmp_path / "merged", weights=[0.7, -0.3, 2], dtype="fp32")
    report = unmerge_checkpoint(tmp_path / "merged", names[::-1], tmp_path / "back")
    assert report.is_proved
    back = _state(tmp_path / "back")  # what fp32 rounded is far less than half a step of bf16
    assert all(same_bits(t, want[n], Promise.EXACT) for n, t in back.items())


def test_what_does_not_agree_with_the_record_is_refused_by_name(tmp_path):
    _base(tmp_path / "base")
    names = [_adapter(tmp_path / name, name) for name in ("bone", "mini")]
    other = _adapter(tmp_path / "other", "bone")
    merge_checkpoint(tmp_path / "base", names, tmp_path / "merged", weights=[1, 0.5])
    before = listing(tmp_path)
    for adapters, weights, words in (
        ([names[0], other], None, r"other did not go in \(its hash is another\); .*mini went in and was not given"),
        ([names[0]], None, "mini went in and was not given"),
        (names, [1, 0.25], r"mini went in with weight 0.5, not 0.25"),
        ([*names, names[0]], None, "bone did not go in"),
    ):
        with pytest.raises(FormatError, match=words):
            unmerge_checkpoint(tmp_path / "merged", adapters, tmp_path / "back", weights=weights)
    assert listing(tmp_path) == before


def test_replaced_tensors_come_from_the_base_or_are_refused(tmp_path):
    want = _base(tmp_path / "base", torch.float32)
    others = {"norm.weight": torch.full((8,), 3.0)}
    _adapter(tmp_path / "adapter", "bone", others=others, modules_to_save=["norm"])
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(FlashboneError, match=r"norm.weight was replaced .* give --base"):
        unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    report = unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back", base=tmp_path / "base")
    assert (report.replaced, report.computed) == (1, 2)
    assert same_bits(_state(tmp_path / "back")["norm.weight"], want["norm.weight"], Promise.STORED)


def test_a_model_that_is_not_the_base_is_refused(tmp_path):
    state = _base(tmp_path / "base")
    _adapter(tmp_path / "adapter", "bone")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    save_file(state | {"c.weight": torch.ones(8, 8).bfloat16()}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(FormatError, match=r"other is not the base that went in, .* differ: c.weight"):
        unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back", base=tmp_path / "other")
    (tmp_path / "merged" / "merge.json").unlink()
    with pytest.raises(FormatError, match=r"other is not the base .* not by any adapter differ c.weight"):
        unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back", base=tmp_path / "other")
    save_file({"c.weight": torch.ones(8, 8).bfloat16()}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(FormatError, match=r"these differ: a.weight, b.weight"):
        unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back", base=tmp_path / "other")
    assert not (tmp_path / "back").exists()


def test_what_nothing_leads_back_from_is_refused(tmp_path):
    _base(tmp_path / "base", torch.float32)
    names = [_adapter(tmp_path / name, name) for name in ("bat-row", "orthogonal")]
    merge_checkpoint(tmp_path / "base", names, tmp_path / "merged")
    with pytest.raises(FlashboneError, match=r"two adapters on a.weight depend on the base weight .* on b.weight"):
        unmerge_checkpoint(tmp_path / "merged", names, tmp_path / "back")
    blocks = {"c": -torch.eye(4).repeat(2, 1, 1)}
    write_adapter(tmp_path / "singular", "bat-col", blocks)
    merge_checkpoint(tmp_path / "base", tmp_path / "singular", tmp_path / "merged-2")
    with pytest.raises(FlashboneError, match=r"c.weight: .* singular"):
        unmerge_checkpoint(tmp_path / "merged-2", tmp_path / "singular", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_merge_into_a_merged_model_is_taken_back_step_by_step(tmp_path):
    _base(tmp_path / "base")
    first, second = _adapter(tmp_path / "first", "bone"), _adapter(tmp_path / "second", "bat-col")
    merge_checkpoint(tmp_path / "base", first, tmp_path / "merged", dtype="fp32")
    merge_checkpoint(tmp_path / "merged", second, tmp_path / "twice")
    record = json.loads((tmp_path / "twice" / "merge.json").read_text())
    assert record["base_record"] == json.loads((tmp_path / "merged" / "merge.json").read_text())
    unmerge_checkpoint(tmp_path / "twice", second, tmp_path / "once")
    once = json.loads((tmp_path / "once" / "merge.json").read_text())
    lost = {n for n, t in once["result"].items() if t["sha256"] == "0" * 64}
    assert lost == {"a.weight", "b.weight"}
    for name in lost:
        once["result"][name]["sha256"] = record["base_record"]["result"][name]["sha256"]
    assert once == record["base_record"]
    report = unmerge_checkpoint(tmp_path / "once", first, tmp_path / "back")
    assert report.relative_rms_error < 1e-2


def _merged_with_norm(folder, **fields):
    """A merge of blocks and of a value for the norm; the base's state."""
    state = _base(folder / "base")
    others = {"norm.weight": torch.full((8,), 3.0)}
    _adapter(folder / "adapter", "bone", others=others, modules_to_save=["norm"])
    merge_checkpoint(folder / "base", folder / "adapter", folder / "merged", dtype="fp32", **fields)
    return state


@pytest.mark.parametrize("name", ["norm.weight", "a.weight", "c.weight", "ids"])
def test_a_base_with_another_tensor_is_refused_and_proves_nothing(tmp_path, name):
    state = _merged_with_norm(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "wrong")
    save_file(state | {name: state[name] + 1}, tmp_path / "wrong" / "model.safetensors")
    with pytest.raises(FormatError, match=rf"wrong is not the base that went in, .* differ: {name}$"):
        unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back", base=tmp_path / "wrong")
    assert not (tmp_path / "back").exists()
    report = unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back", base=tmp_path / "base")
    assert (report.is_proved, report.proved, report.replaced) == (True, 3, 1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ids", lambda t: t + 1),
        ("c.weight", lambda t: t * 2),
        ("c.weight", lambda t: t.view(4, 16)),
        ("c.weight", lambda t: t.view(torch.int32)),
        ("a.weight", lambda t: t * 2),
    ],
)
def test_a_tensor_that_changed_since_the_merge_is_refused_by_name(tmp_path, name, change):
    _merged_with_norm(tmp_path)
    state = _state(tmp_path / "merged")
    save_file(state | {name: change(state[name])}, tmp_path / "merged" / "model.safetensors")
    with pytest.raises(FormatError, match=rf"merged: changed since it was merged, .* says: {name}; "):
        unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back", base=tmp_path / "base")
    assert not (tmp_path / "back").exists()


def test_what_one_merge_lost_is_not_proved_by_another(tmp_path):
    state = _base(tmp_path / "base")
    first = write_adapter(tmp_path / "first", "bone", {"c": random_block("bone", 8, 8, 4, dtype=torch.float32)})
    second = _adapter(tmp_path / "second", "bone")
    merge_checkpoint(tmp_path / "base", first, tmp_path / "merged")
    merge_checkpoint(tmp_path / "merged", second, tmp_path / "twice")
    assert not unmerge_checkpoint(tmp_path / "twice", second, tmp_path / "once").is_proved
    assert not torch.equal(_state(tmp_path / "once")["a.weight"], state["a.weight"])
    assert not unmerge_checkpoint(tmp_path / "once", first, tmp_path / "back").is_proved
    report = unmerge_checkpoint(tmp_path / "once", first, tmp_path / "2", base=tmp_path / "base")
    assert not report.is_proved
    assert report.max_abs_error > 0


@pytest.mark.parametrize(
    ("where", "value", "field"),
    [
        (("tensors", "a.weight", "dtype"), "I64", "tensors.a.weight"),
        (("tensors", "a.weight", "dtype"), [], "tensors.a.weight"),
        (("tensors", "a.weight", "sha256"), None, "tensors.a.weight"),
        (("tensors", "a.weight", "change"), "lost", "tensors.a.weight"),
        (("result", "ids"), {"dtype": "I64"}, "result.ids"),
        (("result",), None, "result"),
        (("adapters", 0, "files"), [{}], r"adapters\[0\]"),
        (("adapters", 0, "name"), None, r"adapters\[0\]"),
        (("adapters", 0, "weight"), float("nan"), r"adapters\[0\]"),
        (("adapters", 0, "weight"), 1e39, r"adapters\[0\]"),
        (("adapters",), [], "adapters"),
        (("base_config",), 3, "base_config"),
        (("base_config",), "\ud800", "base_config"),
        (("base_record",), 3, "base_record.not an object"),
        (("base_record",), {"tensors": {}, "result": {}, "adapters": [3]}, r"base_record.adapters\[0\]"),
    ],
)
def test_a_damaged_record_is_one_line_that_names_the_field(tmp_path, where, value, field):
    _merged_with_norm(tmp_path)
    file = tmp_path / "merged" / "merge.json"
    content = inner = json.loads(file.read_text())
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=rf"merge.json: flashbone did not write this, .*: {field}; [^\n]*$"):
        unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back", base=tmp_path / "base")


def test_a_base_whose_name_is_no_unicode_is_recorded(tmp_path):
    _merged_with_norm(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    base = (tmp_path / "base").rename(tmp_path / name)
    (base / name).write_text("companion")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", dtype="fp32")
    record = json.loads((tmp_path / "out" / "merge.json").read_text(encoding="utf-8"))["base"]
    assert record["name"] == str(base)
    assert name in [file["name"] for file in record["files"]]
    assert unmerge_checkpoint(tmp_path / "out", tmp_path / "adapter", tmp_path / "back", base=base).is_proved
