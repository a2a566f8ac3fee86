"""RWKV models: one `.pth` file in, one out."""

import pytest
import torch

from flashbone import merge_checkpoint
from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.files import outputs
from flashbone.files.base import open_base
from helpers import reference
from helpers.adapter_folders import listing, write_adapter
from helpers.comparison import Promise, close, same_bits

NAME = "blocks.0.att.receptance"


@pytest.fixture
def place(tmp_path):
    state = {
        "emb.weight": torch.randn(10, 8),
        "blocks.0.ln1.weight": torch.randn(8),
        f"{NAME}.weight": torch.randn(8, 8),
        "blocks.0.att.time_maa_x": torch.randn(1, 1, 8),
        "head.weight": torch.randn(10, 8),
    }
    torch.save(state, tmp_path / "base.pth")
    write_adapter(tmp_path / "adapter", "bat-row", {NAME: torch.randn(2, 4, 4) / 3})
    return tmp_path, state


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_pth_file_is_merged_into_a_pth_file(place, prefix, dtype):
    folder, state = place
    block = torch.randn(2, 4, 4) / 3
    write_adapter(folder / "adapter", "bat-row", {f"{prefix}{NAME}": block})
    report = merge_checkpoint(folder / "base.pth", folder / "adapter", folder / "out.pth", dtype=dtype)
    got = torch.load(folder / "out.pth", weights_only=True, mmap=True)
    wanted = torch.bfloat16 if dtype else torch.float32
    assert list(got) == list(state)
    for name, W in state.items():
        want = W.double() + reference.delta("bat-row", W, block) if NAME in name else W
        assert got[name].dtype == wanted
        assert close(got[name], want, wanted)
        assert NAME in name or same_bits(got[name], W.to(wanted), Promise.EXACT)
    assert report.bytes_written == (folder / "out.pth").stat().st_size
    assert report.record["base"]["files"][0]["bytes"] == (folder / "base.pth").stat().st_size


def test_tied_tensors_stay_tied_and_cannot_be_changed_alone(place):
    folder, state = place
    state["head.weight"] = state["emb.weight"]
    torch.save(state, folder / "base.pth")
    for dtype in (None, "bf16"):
        merge_checkpoint(folder / "base.pth", folder / "adapter", folder / f"{dtype}.pth", dtype=dtype)
        got = torch.load(folder / f"{dtype}.pth", weights_only=True)
        assert got["head.weight"].data_ptr() == got["emb.weight"].data_ptr()
        assert same_bits(got["emb.weight"], state["emb.weight"].to(got["emb.weight"].dtype), Promise.EXACT)
    write_adapter(folder / "both", "bone", {NAME: torch.randn(4, 8), "head": torch.randn(4, 10)})
    for dtype in (None, "bf16"):
        with pytest.raises(FormatError, match=r"head.weight is tied to emb.weight, so changing one"):
            merge_checkpoint(folder / "base.pth", folder / "both", folder / "out.pth", dtype=dtype)
    assert not (folder / "out.pth").exists()


def test_what_a_single_file_cannot_be_is_refused(place):
    folder, _ = place
    before = listing(folder)
    with pytest.raises(ConfigError, match=r"shard size: .* is one file"):
        merge_checkpoint(folder / "base.pth", folder / "adapter", folder / "out.pth", shard_size="1GB")
    with pytest.raises(FlashboneError, match=r"and so is the result; name it .*out.pth"):
        merge_checkpoint(folder / "base.pth", folder / "adapter", folder / "out")
    with pytest.raises(FlashboneError, match=r"base.pth: the output must not be"):
        merge_checkpoint(folder / "base.pth", folder / "adapter", folder / "base.pth")
    (folder / "out.pth").touch()
    with pytest.raises(FlashboneError, match=r"out.pth: exists already"):
        merge_checkpoint(folder / "base.pth", folder / "adapter", folder / "out.pth")
    (folder / "out.pth").unlink()
    assert listing(folder) == before
    assert outputs.leftovers(folder / "out.pth") == []


def test_a_check_can_open_the_hidden_result_as_a_model(place):
    """The slow tests of --verify do it with real models."""
    folder, state = place
    checked = []

    def check(result):
        checked.append((result.name, list(open_base(result).entries)))
        assert not (folder / "out.pth").exists()

    merge_checkpoint(folder / "base.pth", folder / "adapter", folder / "out.pth", check=check)
    assert checked == [("out.pth", list(state))]
    assert [path for path in listing(folder) if "out" in path] == ["out.pth"]
