"""torch's zipped pickles that are refused: damaged, of another kind, forged, or with code in them."""

import errno
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashbone.errors import FormatError
from flashbone.files import pickled, pth


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(2)}, tmp_path / "whole.pth")
    whole, cut = (tmp_path / "whole.pth").read_bytes(), tmp_path / "cut.pth"
    for size in (*range(0, 1000, 7), *range(1000, len(whole))):
        cut.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"not a whole torch file .*copy or download it again"):
            pth.scan(cut)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 4000), byte=st.integers(0, 255))
def test_a_damaged_byte_is_refused_or_leaves_tensors_inside_the_file(tmp_path, position, byte):
    path = tmp_path / "damaged.pth"
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(2)}, path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = byte
    path.write_bytes(data)
    try:
        found = pth.scan(path)
    except FormatError:
        return
    assert [(e.name, e.dtype, e.shape, e.end - e.start) for e in found.entries] == [
        ("a", "F32", (2, 3), 24),
        ("b", "F32", (2,), 8),
    ]
    assert [e.name for e in found.entries if not 0 < e.start <= e.end < len(data)] == []


def test_a_member_cannot_reach_into_the_next(tmp_path):
    """A longer extra field would shift the data: the directory says where the next member begins."""
    torch.save({"a": torch.ones(16), "b": torch.ones(16)}, tmp_path / "f.pth")
    data = bytearray((tmp_path / "f.pth").read_bytes())
    with zipfile.ZipFile(tmp_path / "f.pth") as archive:
        header = archive.getinfo("f/data/0").header_offset
    (extra,) = struct.unpack_from("<H", data, header + 28)
    struct.pack_into("<H", data, header + 28, extra + 64)
    (tmp_path / "f.pth").write_bytes(data)
    with pytest.raises(FormatError, match="data/0 overlaps what follows it"):
        pth.scan(tmp_path / "f.pth")


def _zip(path: Path, **members: bytes | dict) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name.replace('__', '/').replace('data_pkl', 'data.pkl')}", data)
    return path


class _Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_pickles_with_code_are_refused_by_name_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": _Code()}, "f.pth")
    with pytest.raises(FormatError, match=r"f\.pth: refused, its pickle asks for (posix|nt)\.system, .* can run code"):
        pth.scan(Path("f.pth"))
    assert not Path("ran").exists()


def _compressed(folder: Path) -> Path:
    torch.save({"a": torch.ones(100)}, folder / "saved.pth")
    with zipfile.ZipFile(folder / "saved.pth") as old, zipfile.ZipFile(folder / "f.pth", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED)
    return folder / "f.pth"


def _without(folder: Path, member: str, replaced: bytes | None = None, encrypted: bool = False) -> Path:
    torch.save({"a": torch.ones(2)}, folder / "saved.pth")
    with zipfile.ZipFile(folder / "saved.pth") as old, zipfile.ZipFile(folder / "f.pth", "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith(member):
                data = replaced
            if data is not None:
                new.writestr(info.filename, data)
                if encrypted and info.filename.endswith(member):
                    new.infolist()[-1].flag_bits |= 1
    return folder / "f.pth"


def _saved(folder: Path, content: object, **settings_) -> Path:
    torch.save(content, folder / "f.pth", **settings_)
    return folder / "f.pth"


def _bare_pickle(folder: Path) -> Path:
    (folder / "f.pth").write_bytes(pickle.dumps({"a": 1}))
    return folder / "f.pth"


def _other_zip(folder: Path) -> Path:
    return _zip(folder / "f.pth", readme=b"hello")


def _script(folder: Path) -> Path:
    return _zip(folder / "f.pth", data_pkl=b"", **{"constants.pkl": b"", "code__x.py": b""})


def _forged_size(count: int) -> bytes:
    """A pickle whose tensor of two numbers lies in a storage that claims another count."""
    tensor = pickled.whole("F32", (2,), "0")
    return pickled.dump({"a": tensor._replace(storage=tensor.storage._replace(size=count))})


REFUSED = {
    "a bare pickle": (_bare_pickle, "is a bare pickle, as torch saved before 1.6"),
    "torch's old format": (
        lambda folder: _saved(folder, {"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
        "is a bare pickle, as torch saved before 1.6.* torch.save",
    ),
    "nothing": (lambda folder: _zip(folder / "f.pth"), "did not write, it has no data.pkl"),
    "another zip": (_other_zip, "did not write, it has no data.pkl"),
    "TorchScript": (_script, "is a TorchScript archive, which holds code"),
    "compression": (_compressed, "is compressed, .*torch.save"),
    "encryption": (lambda folder: _without(folder, "data/0", b"x" * 8, encrypted=True), "data/0 is encrypted"),
    "big endian": (lambda folder: _without(folder, "byteorder", b"big"), "byteorder: got 'big', wanted 'little'"),
    "no storage": (lambda folder: _without(folder, "data/0"), "it lacks .*/data/0, which its pickle names"),
    "a short storage": (
        lambda folder: _without(folder, "data/0", b"1234567"),
        "not a whole .*a does not fit into the 7 bytes",
    ),
    "a torn pickle": (lambda folder: _without(folder, "data.pkl", b"\x80\x02}("), "not a whole torch file"),
    "another size": (
        lambda folder: _without(folder, "data.pkl", _forged_size(1)),
        "not a whole torch file .*a does not fit into the 8 bytes",
    ),
    "a tensor": (lambda folder: _saved(folder, torch.ones(2)), "wanted a dict of tensors by name, it holds a tensor"),
    "a list": (lambda folder: _saved(folder, [torch.ones(2)]), "it holds a list"),
    "a training run": (
        lambda folder: _saved(folder, {"model": {"a": torch.ones(2)}, "step": 3, "name": "x"}),
        "model is a dict; save that of the model alone; step is a int; name is a str",
    ),
    "numbered tensors": (lambda folder: _saved(folder, {3: torch.ones(2)}), "a key is a int"),
    "views": (
        lambda folder: _saved(folder, {"a": torch.ones(3, 2).T, "b": torch.ones(4)[::2], "c": torch.ones(1)}),
        r"a is a view that is not contiguous; save its contiguous\(\); b is a view .*contiguous\(\)$",
    ),
    "conjugates": (
        lambda folder: _saved(folder, {"a": torch.ones(3, dtype=torch.complex64).conj()}),
        "a is a conjugated or negated view",
    ),
    "sparse": (
        lambda folder: _saved(folder, {"a": torch.ones(3, 3).to_sparse()}),
        "refused, its pickle asks for torch._utils._rebuild_sparse_tensor",
    ),
    "a module": (lambda folder: _saved(folder, torch.nn.Linear(2, 2)), "refused, its pickle asks for torch.nn.modules"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_is_no_dict_of_plain_tensors_is_refused_by_name(tmp_path, case):
    make, message = REFUSED[case]
    path = make(tmp_path)
    with pytest.raises(FormatError, match=rf"^[^\n]*f\.pth: .*{message}[^\n]*$"):
        pth.scan(path)


def test_two_members_of_one_name_are_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "f.pth")
    with zipfile.ZipFile(tmp_path / "f.pth", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("f/data/0", bytes(8))
    with pytest.raises(FormatError, match="it holds two members of one name"):
        pth.scan(tmp_path / "f.pth")


@pytest.mark.parametrize("where", ["signature", "name"])
def test_a_member_that_does_not_lie_where_the_directory_says_is_refused(tmp_path, where):
    torch.save({"a": torch.ones(16), "b": torch.ones(16)}, tmp_path / "f.pth")
    data = bytearray((tmp_path / "f.pth").read_bytes())
    with zipfile.ZipFile(tmp_path / "f.pth") as archive:
        header = archive.getinfo("f/data/1").header_offset
    data[header + (3 if where == "signature" else 30)] ^= 1
    (tmp_path / "f.pth").write_bytes(data)
    with pytest.raises(FormatError, match="data/1 is not where the archive's directory puts it"):
        pth.scan(tmp_path / "f.pth")


def test_a_name_of_a_folder_that_is_not_ascii_is_read_as_zip_files_spell_it(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "saved.pth")
    with zipfile.ZipFile(tmp_path / "saved.pth") as old, zipfile.ZipFile(tmp_path / "f.pth", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename.replace("saved/", "größe/"), old.read(info))
    (entry,) = pth.scan(tmp_path / "f.pth").entries
    assert (tmp_path / "f.pth").read_bytes()[entry.start : entry.end] == torch.ones(2).numpy().tobytes()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_an_error_of_the_disk_is_not_called_damage(tmp_path, monkeypatch, number):
    torch.save({"a": torch.ones(2)}, tmp_path / "f.pth")

    def broken(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pth, "_entries", broken)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        pth.scan(tmp_path / "f.pth")
    assert caught.value.errno == number


def test_a_large_index_in_a_pickle_allocates_nothing(tmp_path):
    """C's unpickler would make as many places: 16 GiB here."""
    _zip(tmp_path / "f.pth", data_pkl=b"\x80\x02}r\xff\xff\xff\x7f.")
    tracemalloc.start()
    try:
        assert pth.scan(tmp_path / "f.pth").entries == ()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        pth.scan(tmp_path / "absent.pth")
