"""Files of RWKV-PEFT, built from the format's description: what they mean, and the way to BONE folders and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flashbone import variants
from flashbone.errors import FormatError
from flashbone.files import peft, rwkv
from flashbone.files.adapter import Adapter, same_values
from helpers import reference
from helpers.adapter_folders import listing
from helpers.comparison import close

WIDTH, HIDDEN = 12, 48


def rwkv_file(file: Path, mode: str, r: int, *, suffix: str = "disha", lead: str = "", version: int = 7) -> dict:
    """A file as RWKV-PEFT saves it: bf16, two layers; `bone` may have an r that does not divide."""
    state: dict[str, Tensor] = {}
    for layer in range(2):
        att = {"receptance": WIDTH, "key": WIDTH, "value": WIDTH, "output": WIDTH}
        sizes = {f"att.{name}": (out, WIDTH) for name, out in att.items()}
        sizes |= {"ffn.key": (HIDDEN, WIDTH), "ffn.value": (WIDTH, HIDDEN)}
        for name, (out, in_) in sizes.items():
            shape = (r, out) if mode == "bone" else (in_ // r, r, r)
            state[f"{lead}blocks.{layer}.{name}.{suffix}"] = torch.randn(shape).bfloat16()
        for norm in ("ln1", "ln2", "att.ln_x", *(["ln0"] if layer == 0 else [])):
            for leaf in ("weight", "bias"):
                state[f"{lead}blocks.{layer}.{norm}.{leaf}"] = torch.randn(WIDTH).bfloat16()
        if version == 6:
            for name, shape in {
                "time_decay": (1, 1, WIDTH),
                "time_faaaa": (3, 4),
                "time_maa_w2": (5, 4, WIDTH),
            }.items():
                state[f"{lead}blocks.{layer}.att.{name}"] = torch.randn(shape).bfloat16()
    state[f"{lead}ln_out.weight"] = torch.randn(WIDTH).bfloat16()
    torch.save(state, file) if file.suffix == ".pth" else save_file(state, file)
    return state


def assert_equal(got: Adapter, want: Adapter) -> None:
    assert got.variant == want.variant
    for ours, theirs in ((got.blocks, want.blocks), (got.replacements, want.replacements)):
        assert ours.keys() == theirs.keys()
        assert all(same_values(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["rwkv-0.pth", "rwkv-0.safetensors"])
@pytest.mark.parametrize(("mode", "r"), [("bone", 4), ("bone", 5), ("bat", 4)])
@pytest.mark.parametrize("suffix", ["disha", "bone"])
@pytest.mark.parametrize("lead", ["", "model."])
def test_blocks_and_replacements_are_read_as_they_are(tmp_path, name, mode, r, suffix, lead):
    state = rwkv_file(tmp_path / name, mode, r, suffix=suffix, lead=lead)
    adapter = rwkv.read_adapter(tmp_path / name)
    assert adapter.variant == variants.get({"bone": "bone", "bat": "bat-row"}[mode])
    assert (adapter.base_model, adapter.config) == (None, {})
    assert set(adapter.replacements) == {key.removeprefix(lead) for key in state if "ln" in key}
    assert len(adapter.blocks) == 12
    assert all(same_values(block, state[f"{lead}{n}.{suffix}"]) for n, block in adapter.blocks.items())


@pytest.mark.parametrize(("mode", "r", "version"), [("bone", 5, 7), ("bat", 4, 6)])
def test_the_way_to_a_bone_folder_and_back_is_equal_to_the_bit(tmp_path, mode, r, version):
    state = rwkv_file(tmp_path / "rwkv-0.pth", mode, r, version=version)
    adapter = rwkv.read_adapter(tmp_path / "rwkv-0.pth")
    (tmp_path / "bone").mkdir()
    peft.write(adapter, tmp_path / "bone")
    bone = peft.read(tmp_path / "bone")
    assert_equal(bone, adapter)
    norms = {key.rpartition(".")[0] for key in state if ".ln" in f".{key}"}
    assert set(bone.config["modules_to_save"]) == norms
    assert set(bone.config["parameters_to_save"]) == {key for key in state if "time_" in key}
    rwkv.write(bone, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == state.keys()
    assert all(same_values(again[key], state[key]) for key in state)


@pytest.mark.parametrize("variant", ["bone", "bat-row"])
def test_peft_to_rwkv_peft_and_back_is_equal_to_the_bit(tmp_path, variant):
    blocks = {f"model.blocks.{i}.att.key": torch.randn((4, 10) if variant == "bone" else (3, 4, 4)) for i in range(2)}
    adapter = Adapter(variants.get(variant), blocks, {"model.ln_out.weight": torch.randn(10)}, {})
    rwkv.write(adapter, tmp_path / "a.pth")
    again = rwkv.read_adapter(tmp_path / "a.pth")
    assert all(name.startswith(("blocks.", "ln_out")) for name in (*again.blocks, *again.replacements))
    for ours, theirs in ((again.blocks, adapter.blocks), (again.replacements, adapter.replacements)):
        assert {f"model.{name}" for name in ours} == theirs.keys()
        assert all(same_values(value, theirs[f"model.{name}"]) for name, value in ours.items())


def test_a_square_layer_shows_that_bat_row_is_not_bat_col(tmp_path):
    """The same block, of the same shape: as RWKV-PEFT merges it, it is bat-row."""
    W, block = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH // 4, 4, 4)
    cut = W.view(3, 4, 3, 4).transpose(1, 2)  # the merge script's '(a r1) (b r2) -> a b r1 r2'
    theirs = (cut @ block + block).transpose(1, 2).reshape(WIDTH, WIDTH)
    torch.save({"blocks.0.att.key.disha": block}, tmp_path / "a.pth")
    adapter = rwkv.read_adapter(tmp_path / "a.pth")
    assert close(adapter.variant.delta(W, adapter.blocks["blocks.0.att.key"]), theirs)
    assert close(reference.delta("bat-row", W, block), theirs, torch.float32)
    assert not close(reference.delta("bat-col", W, block), theirs, torch.float32)
    (tmp_path / "bone").mkdir()
    peft.write(adapter, tmp_path / "bone")
    rwkv.write(peft.read(tmp_path / "bone"), tmp_path / "again.pth")
    assert_equal(rwkv.read_adapter(tmp_path / "again.pth"), adapter)
    col = Adapter(variants.get("bat-col"), adapter.blocks, {}, {})
    with pytest.raises(FormatError, match=r"bat-row \(its mode bat\) only; keep it as BONE, or convert it to miss"):
        rwkv.write(col, tmp_path / "col.pth")
    assert not (tmp_path / "col.pth").exists()


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    whole = torch.randn(8, 12)
    blocks = {"blocks.0.att.key": whole[:4], "blocks.1.att.key": whole[:4]}  # of one memory, which a pickle would keep
    files = [tmp_path / name for name in ("a.pth", "b.pth")]
    for file, tensors in zip(files, (blocks, {name: block.clone() for name, block in blocks.items()}), strict=True):
        rwkv.write(Adapter(variants.get("bone"), tensors, {}, {}), file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_other_leading_parts_are_taken_off_if_all_names_share_them(tmp_path):
    blocks = {"rwkv.blocks.0.att.key": torch.ones(4, 8), "rwkv.head": torch.ones(4, 8)}
    rwkv.write(Adapter(variants.get("bone"), blocks, {}, {}), tmp_path / "a.pth")
    assert list(rwkv.read_adapter(tmp_path / "a.pth").blocks) == ["blocks.0.att.key", "head"]


@pytest.mark.parametrize(
    ("variant", "block", "fields", "words"),
    [
        (
            "mini",
            torch.ones(4, 2),
            {},
            "mini adapter cannot be written as rwkv-peft.*convert it to miss or a LoRA",
        ),
        ("orthogonal", torch.ones(4, 4), {}, "convert it to a LoRA"),
        ("bone", torch.ones(4, 8), {"names": ("blocks.0.att.key", "model.ln_out")}, r"RWKV model \(model\.ln_out\)"),
        ("bone", torch.ones(4, 8), {"names": ("model.layers.0.q",)}, r"RWKV model \(model\.layers\.0\.q\)"),
        ("bone", torch.ones(4, 8), {"names": ("model.emb", "model.q")}, r"RWKV model \(model\.q\)"),
        (
            "bone",
            torch.ones(4, 8),
            {"transposed": frozenset({"emb"}), "names": ("emb",)},
            r"layers only \(emb\)",
        ),
        ("bone", torch.ones(4, 8), {"replaced": "blocks.0.att.disha"}, r"blocks.0.att.disha|would mean something else"),
        ("bone", torch.ones(4, 8).to(torch.float8_e5m2), {}, "float8_e5m2, wanted fp64"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_in_one_line(tmp_path, variant, block, fields, words):
    names = fields.pop("names", ("blocks.0.att.key",))
    replaced = {fields.pop("replaced"): torch.ones(3)} if "replaced" in fields else {}
    adapter = Adapter(variants.get(variant), {name: block.clone() for name in names}, replaced, {}, **fields)
    with pytest.raises(FormatError, match=words) as caught:
        rwkv.write(adapter, tmp_path / "a.pth")
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"blocks.0.att.key.bone": torch.ones(8, 4)}, "count output shards, as the first versions of RWKV-PEFT did"),
        (
            {"blocks.0.ffn.key.bone": torch.ones(8, 4, 4), "blocks.0.ffn.value.bone": torch.ones(2, 4, 4)},
            "count output shards.*: blocks.0.ffn.key; only",
        ),
        (
            {"blocks.0.att.key.disha": torch.ones(4, 8), "blocks.1.att.key.disha": torch.ones(2, 4, 4)},
            "it mixes blocks of the modes bone and bat",
        ),
        ({"blocks.0.att.key.disha": torch.ones(4, 8).int()}, "got torch.int32, wanted floating point"),
        (
            {"blocks.0.att.key.disha": torch.ones(4, 8), "layers.0.w": torch.ones(1)},
            "layers.0.w: not a name of",
        ),
        ({"blocks.0.att.key.disha": torch.ones(4, 8).to_sparse()}, "refused, its pickle asks for"),
        ({3: torch.ones(4, 8)}, "a key is a int"),
    ],
)
def test_what_is_read_wrongly_elsewhere_is_refused_here(tmp_path, state, words):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(FormatError, match=words) as caught:
        rwkv.read_adapter(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    torch.save({"blocks.0.att.key.disha": torch.ones(4, 8)}, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    for size in (0, 3, 30, len(whole) // 2, len(whole) - 20, len(whole) - 1):
        (tmp_path / "a.pth").write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"a\.pth"):
            rwkv.read_adapter(tmp_path / "a.pth")
