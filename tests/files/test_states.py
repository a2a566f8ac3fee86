"""All tensors of one file: which reader a file gets, what is refused, and what is copied before it is written."""

import errno
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from flashbone.errors import FormatError
from flashbone.files import states
from helpers.comparison import Promise, same_bits


def test_the_suffix_decides_which_file_it_is(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "f.safetensors")
    assert same_bits(states.read_state(tmp_path / "f.safetensors")["a"], torch.ones(2), Promise.STORED)
    torch.save({"a": torch.ones(2)}, tmp_path / "f.bin")
    assert same_bits(states.read_state(tmp_path / "f.bin")["a"], torch.ones(2), Promise.STORED)
    (tmp_path / "f.bin").rename(tmp_path / "g.safetensors")
    with pytest.raises(FormatError, match=r"g.safetensors: not a whole safetensors file"):
        states.read_state(tmp_path / "g.safetensors")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "\x00", "a\u2028b"])
def test_names_that_a_terminal_would_obey_are_refused_in_a_printable_form(tmp_path, name):
    save_file({name: torch.ones(2), "plain": torch.ones(2)}, tmp_path / "f.safetensors")
    with pytest.raises(FormatError, match="names of tensors hold control characters: ") as caught:
        states.read_state(tmp_path / "f.safetensors")
    assert str(caught.value).isprintable()
    assert "plain" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_an_error_of_the_disk_is_not_called_damage(tmp_path, monkeypatch, number):
    torch.save({"a": torch.ones(2)}, tmp_path / "f.bin")

    def broken(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(zipfile, "ZipFile", broken)
    with pytest.raises(FormatError if number == errno.EINVAL else OSError, match=os.strerror(number)):
        states.read_state(tmp_path / "f.bin")


@pytest.mark.parametrize(
    "value",
    [torch.ones(3, 3).to_sparse(), torch.ones(3, device="meta"), [torch.ones(3)], bytearray(3), 3],
    ids=["sparse", "meta", "list", "bytes", "number"],
)
def test_only_tensors_with_all_their_values_are_read(tmp_path, value):
    torch.save({"a": value, "b": torch.ones(3)}, tmp_path / "f.bin")
    with pytest.raises(FormatError, match=r"refused, its pickle asks for|a is a (list|bytearray|int)"):
        states.read_state(tmp_path / "f.bin")


def test_views_with_their_axes_in_any_order_are_read_and_expanded_ones_are_not(tmp_path):
    whole = torch.randn(6, 4)
    state = {"turned": whole.T, "rows": whole[2:5], "column": whole[:, 1], "empty": whole[:0], "again": whole}
    torch.save(state, tmp_path / "f.bin")
    read = states.read_state(tmp_path / "f.bin")
    assert all(same_bits(read[name], tensor, Promise.STORED) for name, tensor in state.items())
    torch.save({"huge": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "f.bin")
    with pytest.raises(FormatError, match="huge is a view that is not contiguous"):
        states.read_state(tmp_path / "f.bin")


def test_many_names_of_the_same_bytes_are_bounded_by_the_file(tmp_path):
    whole = torch.zeros(1000, 100)
    torch.save({f"t{n}": whole for n in range(10)}, tmp_path / "f.bin")
    assert len(states.read_state(tmp_path / "f.bin")) == 10
    torch.save({f"t{n}": whole for n in range(100)}, tmp_path / "f.bin")
    with pytest.raises(FormatError, match=r"its tensors claim 40,000,000 bytes, the file has"):
        states.read_state(tmp_path / "f.bin")


def test_tensors_are_copied_only_where_they_share_memory_or_are_not_contiguous():
    own, whole = torch.ones(4, 4), torch.ones(4, 4)
    state = {"own": own, "first": whole, "again": whole, "part": torch.ones(8)[:4], "turned": torch.rand(4, 3).T}
    apart = states.separate(state)
    assert apart["own"] is own
    assert apart["first"] is whole
    assert all(same_bits(apart[name], state[name], Promise.STORED) for name in state)
    assert all(apart[name] is not state[name] for name in ("again", "part", "turned"))
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in apart.values())


def test_all_tensors_of_other_dtypes_are_named():
    with pytest.raises(FormatError, match=r"a is int8, b is complex64, wanted fp64, fp32, bf16 or fp16"):
        states.separate({"a": torch.ones(2).to(torch.int8), "b": torch.ones(2) * 1j, "c": torch.ones(2)})
