"""The safetensors layout: our reader against the safetensors library, and files that are damaged."""

import hashlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flashbone.errors import FormatError
from flashbone.files import tensors
from flashbone.merge.write import HashingReader
from helpers.comparison import Promise, same_bits


@pytest.fixture
def file(tmp_path):
    state = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "fp16": torch.randn(7).half(),
        "fp32": torch.randn(2, 3, 4),
        "fp64": torch.randn(4, 2, dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(9),
        "flags": torch.tensor([True, False]),
        "tiny": torch.randn(4).to(torch.float8_e4m3fn),
    }
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def _ignore(count: int) -> None:
    pass


def _copy(found: tensors.TensorFile, out, advance=_ignore) -> str:
    """Write a file again from what is read of it; its sha256."""
    entries = {entry.name: entry for entry in found.entries}
    reader = HashingReader(found.path)
    try:
        layout = [(e.name, e.dtype, e.shape) for e in found.entries]
        tensors.write(out, layout, lambda name: reader.pieces(entries[name]), advance, given_header=found.header)
        return reader.sha256()
    finally:
        reader.close()


def test_tensors_read_as_the_library_reads_them(file):
    want = load_file(file)
    found = tensors.scan(file)
    assert {e.name for e in found.entries} == set(want)
    assert found.size == file.stat().st_size
    with file.open("rb") as stream:
        for entry in found.entries:
            assert entry.shape == tuple(want[entry.name].shape)
            if entry.dtype in tensors.FLOATS:
                stream.seek(entry.start)
                got = tensors.read(stream, entry)
                assert got.dtype == want[entry.name].dtype
                assert same_bits(got, want[entry.name], Promise.STORED)


def test_a_file_without_edits_is_copied_byte_for_byte(file, tmp_path):
    sizes = []
    sha256 = _copy(tensors.scan(file), tmp_path / "out", sizes.append)
    assert (tmp_path / "out").read_bytes() == file.read_bytes()
    assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sum(sizes) == file.stat().st_size


def test_a_file_read_in_any_order_has_its_hash(file):
    found, data = tensors.scan(file), file.read_bytes()
    for order in (found.entries[::-1], found.entries[3:] + found.entries[:5], ()):
        reader = HashingReader(found.path)
        for i, entry in enumerate(order):
            whole = entry.dtype in tensors.FLOATS and i % 2
            read = bytes(tensors.as_bytes(reader.tensor(entry))) if whole else b"".join(reader.pieces(entry))
            assert read == data[entry.start : entry.end]
        assert reader.sha256() == hashlib.sha256(data).hexdigest()
        reader.close()


def test_an_existing_file_is_not_overwritten(file):
    with pytest.raises(FileExistsError):
        _copy(tensors.scan(file), file)


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2)}, tmp_path / "whole")
    whole, cut = (tmp_path / "whole").read_bytes(), tmp_path / "cut"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"truncated|header"):
            tensors.scan(cut)
    cut.write_bytes(whole + b"x")
    with pytest.raises(FormatError, match="promises"):
        tensors.scan(cut)


@pytest.mark.parametrize("length", [93, 2**40, 2**64 - 1])
def test_a_header_longer_than_its_file_is_not_read(tmp_path, length):
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + bytes(92))
    with pytest.raises(FormatError, match=r"not a whole safetensors file; it may be truncated"):
        tensors.scan(tmp_path / "file")


def test_a_header_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    save_file({"a": torch.ones(2)}, tmp_path / "file")
    length = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    monkeypatch.setattr(tensors, "_MAX_HEADER", length)
    assert len(tensors.scan(tmp_path / "file").entries) == 1
    monkeypatch.setattr(tensors, "_MAX_HEADER", length - 1)
    with pytest.raises(FormatError, match=rf"its header has {length} bytes, at most {length - 1} are read"):
        tensors.scan(tmp_path / "file")


def _fields(start: int, end: int, dtype: str = "F32", shape=(1,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": _fields(0, 4), "b": _fields(0, 4)},
        {"a": _fields(4, 8)},
        {"a": _fields(0, 4, shape=(2,))},
        {"a": _fields(0, 4, shape=(-1, -1))},
        {"a": _fields(0, 4, "F3")},
        {"a": _fields(0, 4, "I8", (4,) * 65)},
        {"a": _fields(-4, 0)},
        {"a": {"dtype": "F32"}},
        {"a": 3},
        [],
        3,
    ],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(FormatError):
        tensors.scan(tmp_path / "file")


@pytest.mark.parametrize("dtype", sorted(tensors.BITS))
def test_the_bytes_of_every_dtype_are_checked(tmp_path, dtype):
    """8 numbers fill a multiple of their bits in bytes; one byte more or less is refused."""
    bits = tensors.BITS[dtype]
    for count in (bits - 1, bits, bits + 1):
        text = json.dumps({"a": _fields(0, count, dtype, (8,))}).encode()
        (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(count))
        if count == bits:
            assert tensors.scan(tmp_path / "file").entries[0].end == 8 + len(text) + count
            continue
        with pytest.raises(FormatError, match=rf"tensor a: {count} bytes are not {dtype} of shape"):
            tensors.scan(tmp_path / "file")


def test_a_name_that_comes_twice_is_refused(tmp_path):
    text = f'{{"a": {json.dumps(_fields(0, 4))}, "a": {json.dumps(_fields(4, 8))}}}'.encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(FormatError, match="it names a twice"):
        tensors.scan(tmp_path / "file")


@pytest.mark.parametrize("fields", [_fields(-4, 0, "I8"), _fields(4, 0, "I8"), _fields(0, 4, "I8", (-1,))])
def test_negative_sizes_are_refused_for_what_they_are(tmp_path, fields):
    text = json.dumps({"a": fields}).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(FormatError, match="tensor a has negative sizes"):
        tensors.scan(tmp_path / "file")


@pytest.mark.parametrize("state", [{}, {"a": torch.empty(0, 3)}], ids=["no tensor", "an empty one"])
def test_a_header_may_be_all_there_is(tmp_path, state):
    save_file(state, tmp_path / "file")
    assert [(e.name, e.shape) for e in tensors.scan(tmp_path / "file").entries] == [
        (n, t.shape) for n, t in state.items()
    ]


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 140), byte=st.integers(0, 255))
def test_a_damaged_byte_is_refused_or_leaves_a_readable_file(tmp_path, position, byte):
    path = tmp_path / "damaged"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2)}, path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = byte
    path.write_bytes(data)
    try:
        found = tensors.scan(path)
    except FormatError:
        return
    assert found.size == len(data)
    (tmp_path / "out").unlink(missing_ok=True)
    _copy(found, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == bytes(data)


def test_a_file_that_shrinks_meanwhile_is_an_error(file, tmp_path):
    found = tensors.scan(file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(FormatError, match="meanwhile"):
        _copy(found, tmp_path / "out")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_written_file_is_what_the_library_reads(file, tmp_path, metadata):
    want = load_file(file)
    found = {e.name: e for e in tensors.scan(file).entries}
    layout = [(name, e.dtype, e.shape) for name, e in found.items()]
    data, sizes = file.read_bytes(), []

    def content(name: str):
        yield data[found[name].start : found[name].end][:3]
        yield memoryview(data)[found[name].start : found[name].end][3:]

    tensors.write(tmp_path / "out", layout, content, sizes.append, metadata)
    got = load_file(tmp_path / "out")
    assert [e.name for e in tensors.scan(tmp_path / "out").entries if e.shape != (0, 4)] == [
        name for name in found if name != "empty"
    ]
    assert sum(sizes) == (tmp_path / "out").stat().st_size
    assert [
        n for n in want if got[n].dtype != want[n].dtype or not torch.equal(*(s[n].float() for s in (got, want)))
    ] == []
    with safe_open(tmp_path / "out", "pt") as opened:
        assert opened.metadata() == metadata


def test_content_of_another_size_than_the_layout_says_is_our_bug(tmp_path):
    with pytest.raises(AssertionError, match="a: 3 bytes are not F32 of shape"):
        tensors.write(tmp_path / "out", [("a", "F32", (1,))], lambda name: [b"abc"], _ignore)


_NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
_LAYOUTS = st.dictionaries(
    _NAMES,
    st.tuples(st.sampled_from(list(tensors.FLOATS.values())), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(layout=_LAYOUTS, metadata=st.sampled_from([None, {}, {"format": "pt"}]))
def test_the_size_of_a_file_is_known_before_it_is_written(tmp_path, layout, metadata):
    layout = {name: layout[name] for name in layout if name != "__metadata__"}
    save_file(
        {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in layout.items()}, tmp_path / "f", metadata
    )
    assert tensors.file_size(layout, metadata) == (tmp_path / "f").stat().st_size
    if metadata != {}:  # the library writes that in another place, without tensors as broken JSON
        found = tensors.scan(tmp_path / "f")
        assert tensors.header([(e.name, e.dtype, e.shape) for e in found.entries], metadata) == found.header


def test_a_tensor_of_a_file_that_ended_is_refused(file):
    entry = max(tensors.scan(file).entries, key=lambda e: (e.dtype in tensors.FLOATS, e.end))
    file.write_bytes(file.read_bytes()[: entry.end - 1])
    with file.open("rb") as stream:
        stream.seek(entry.start)
        with pytest.raises(FormatError, match=rf"ended in the middle of {entry.name}; was it"):
            tensors.read(stream, entry)


def test_bytes_of_a_dtype_that_there_is_not_are_not_counted():
    assert tensors.nbytes("F4", (3,)) == 2
    assert tensors.nbytes("F6_E2M3", (4, 2)) == 6
    assert tensors.nbytes("F32", ()) == 4
    with pytest.raises(FormatError, match="dtype: got 'F3', wanted one of F64, F32"):
        tensors.nbytes("F3", (3,))


def test_an_empty_tensor_has_its_dtype(tmp_path):
    save_file({"a": torch.empty(0, 3, dtype=torch.bfloat16)}, tmp_path / "f")
    (entry,) = tensors.scan(tmp_path / "f").entries
    with (tmp_path / "f").open("rb") as stream:
        stream.seek(entry.start)
        got = tensors.read(stream, entry)
    assert (got.dtype, got.shape) == (torch.bfloat16, (0, 3))
