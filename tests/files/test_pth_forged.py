"""Pickles in torch's files that were forged: numbers that no tensor has, storages that are none, calls of names."""

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from flashbone.errors import FormatError
from flashbone.files import pickled, pth


def _zip(path: Path, **members: bytes | dict) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name.replace('__', '/').replace('data_pkl', 'data.pkl')}", data)
    return path


def _word(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


_STORAGE = b"(" + _word(b"storage")
FORGED = {
    "a storage of words": b"}(" + _word(b"a") + _STORAGE + 2 * _word(b"b") + _word(b"cpu") + b"K\x01tQu",
    "an unknown storage": _STORAGE + b"ctorch\nQInt8Storage\n" + _word(b"0") + _word(b"cpu") + b"K\x01tQ",
    "a storage that is a number": b"K\x01Q",
    "a call of a name": b"ctorch\nFloatStorage\n)R",
    "a tensor of nothing": b"}(" + _word(b"a") + b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89}tRu",
    "a changed dict": b"ccollections\nOrderedDict\n)R}" + _word(b"items") + b"Nsb",
    "the end": b"",
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_pickles_are_refused(tmp_path, case):
    _zip(tmp_path / "f.pth", data_pkl=b"\x80\x02" + FORGED[case] + b".", data__0=bytes(4))
    with pytest.raises(FormatError):
        pth.scan(tmp_path / "f.pth")


@pytest.mark.parametrize(
    ("changes", "of_storage", "words"),
    [
        ({"offset": -1}, {}, "rebuilds an invalid tensor"),
        ({"offset": True}, {}, "rebuilds an invalid tensor"),
        ({"offset": 0.0}, {}, "rebuilds an invalid tensor"),
        ({"shape": (-2,), "stride": (-1,)}, {}, "rebuilds an invalid tensor"),
        ({"shape": (2, -1, -1), "stride": (1, 1, 1)}, {}, "rebuilds an invalid tensor"),
        ({"stride": (-1,)}, {}, "rebuilds an invalid tensor"),
        ({"stride": (1, 1)}, {}, "rebuilds an invalid tensor"),
        ({"shape": [2]}, {}, "rebuilds an invalid tensor"),
        ({"stride": [1]}, {}, "rebuilds an invalid tensor"),
        ({"shape": 2}, {}, "rebuilds an invalid tensor"),
        ({}, {"size": -2}, "names an invalid storage"),
        ({}, {"size": True}, "names an invalid storage"),
        ({}, {"size": 2.0}, "names an invalid storage"),
        ({}, {"key": 0}, "names an invalid storage"),
        ({}, {"key": None}, "names an invalid storage"),
    ],
)
def test_numbers_in_a_pickle_that_no_tensor_has_are_refused_for_what_they_are(tmp_path, changes, of_storage, words):
    tensor = pickled.whole("F32", (2,), "0")
    tensor = tensor._replace(storage=tensor.storage._replace(**of_storage), **changes)
    _zip(tmp_path / "f.pth", data_pkl=pickled.dump({"a": tensor}), data__0=bytes(8))
    with pytest.raises(FormatError, match=rf"not a whole torch file \(its pickle {words}\)"):
        pth.scan(tmp_path / "f.pth")


def test_a_storage_of_a_kind_that_there_is_not_is_refused_for_that():
    with pytest.raises(ValueError, match="its pickle names an invalid storage"):
        pickled.table(Path("f.pth"), io.BytesIO(b"\x80\x02" + FORGED["a storage of words"] + b"."))


LATE = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)


def test_a_storage_is_of_the_class_that_torch_has_for_it_else_of_bytes():
    for name, dtype in pickled.DTYPES.items():
        tensor = pickled.whole(name, (3, 2), "7")
        assert (tensor.storage.dtype == "UntypedStorage") == (dtype in LATE)
        assert tensor.storage.nbytes == tensor.nbytes == 6 * dtype.itemsize
        assert (tensor.start, tensor.stride, tensor.is_contiguous) == (0, (2, 1), True)
        data = pickled.dump({"a": tensor})
        assert pickled.table(Path("f"), io.BytesIO(data)) == {"a": tensor}
        assert (b"_rebuild_tensor_v3" in data) == (dtype in LATE)
        assert (b"_rebuild_tensor_v2" in data) == (dtype not in LATE)


@pytest.mark.parametrize(("offset", "shape"), [(1, (2,)), (2, (1,)), (0, (3,)), (10**6, (2,))])
def test_a_tensor_that_reaches_out_of_its_storage_is_refused(tmp_path, offset, shape):
    tensor = pickled.whole("F32", (2,), "0")._replace(offset=offset, shape=shape, stride=(1,))
    _zip(tmp_path / "f.pth", data_pkl=pickled.dump({"a": tensor}), data__0=bytes(8))
    with pytest.raises(FormatError, match=r"a does not fit into the 8 bytes of archive/data/0"):
        pth.scan(tmp_path / "f.pth")


@pytest.mark.parametrize(
    ("storage", "dtype"), [(pickled.PickledStorage("F32", "0", 2), "F3"), ("F32", "F32"), (None, None)]
)
def test_only_a_storage_with_a_dtype_that_is_known_makes_a_tensor(storage, dtype):
    with pytest.raises(ValueError, match="its pickle rebuilds an invalid tensor"):
        pickled._rebuild_v3(storage, 0, (2,), (1,), False, {}, dtype)


def test_empty_tensors_are_tied_to_nothing_and_a_file_has_no_header(tmp_path):
    both = torch.ones(2)
    state = {"a": torch.empty(0), "b": torch.empty(0), "c": both, "d": both}
    state |= {"e": both[:0], "f": both[:0]}  # they begin at one place
    torch.save(state, tmp_path / "f.pth")
    found = pth.scan(tmp_path / "f.pth")
    assert (found.header, pth.tied(found)) == (b"", {"d": "c"})


def test_names_of_members_are_read_in_the_code_page_of_old_zip_files_where_no_flag_says_otherwise(tmp_path):
    members = {"data_pkl": pickled.dump({"a": pickled.whole("F32", (2,), "0")}), "data__0": b"12345678"}
    data = _zip(tmp_path / "f.pth", **members).read_bytes()
    data = data.replace(b"archive/", b"archiv\x81/")  # a u with two dots in code page 437, and no UTF-8
    (tmp_path / "f.pth").write_bytes(data)
    (entry,) = pth.scan(tmp_path / "f.pth").entries
    assert data[entry.start : entry.end] == b"12345678"
