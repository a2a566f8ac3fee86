"""torch's zipped pickles: our reader and writer against torch's, and RWKV models in them as bases."""

import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashbone.errors import FormatError
from flashbone.files import base, names, pickled, pth, tensors
from helpers.comparison import Promise, same_bits
from helpers.processes import run_apart

RWKV = {"emb.weight": (6, 4), "blocks.0.ln0.weight": (4,), "blocks.0.att.key.weight": (4, 4), "head.weight": (6, 4)}


def _state() -> dict[str, Tensor]:
    """Every dtype, sizes of every kind, tied tensors, views of parts."""
    state = {f"dtype {name}": _random((3, 5), dtype) for name, dtype in pickled.DTYPES.items()}
    state |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "no rows": torch.empty(3, 0).half()}
    state |= {"w.weight": torch.randn(4, 3), "parameter": torch.nn.Parameter(torch.randn(2).bfloat16())}
    state["tied"] = state["w.weight"]
    state["tied, of another shape"] = state["w.weight"].view(12)
    state["two rows"] = state["w.weight"][1:3]
    state["first row"] = state["w.weight"][:1]
    return state


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    data = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    return data.view(dtype).view(shape)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    """Names in order, dtypes, shapes, bytes."""
    looks = [[(name, t.dtype, t.shape, _bytes(t)) for name, t in state.items()] for state in (got, want)]
    return looks[0] == looks[1]


def _read(path: Path) -> dict[str, Tensor]:
    """What `scan` finds, read by hand."""
    data = path.read_bytes()
    return {
        e.name: torch.frombuffer(bytearray(data[e.start : e.end]), dtype=pickled.DTYPES[e.dtype]).view(e.shape)
        if e.end > e.start
        else torch.empty(e.shape, dtype=pickled.DTYPES[e.dtype])
        for e in pth.scan(path).entries
    }


def _write(path: Path, state: dict[str, Tensor], aliases: dict[str, str] | None = None, piece: int = 7) -> list[int]:
    """Write a state in small pieces; what was reported as written."""
    written, dtypes = [], {dtype: name for name, dtype in pickled.DTYPES.items()}
    layout = [(name, dtypes[t.dtype], tuple(t.shape)) for name, t in state.items()]

    def content(name: str):
        data = _bytes(state[name])
        yield from (data[i : i + piece] for i in range(0, len(data), piece))

    pth.write(path, layout, content, written.append, aliases)
    return written


@pytest.fixture
def file(tmp_path):
    torch.save(_state(), tmp_path / "saved.pth")
    return tmp_path / "saved.pth"


def test_what_torch_saved_is_found(file):
    assert _same(_read(file), torch.load(file, weights_only=True))
    assert pth.scan(file).size == file.stat().st_size


@pytest.mark.parametrize("table", [dict, OrderedDict, lambda state: torch.nn.ParameterDict(state).state_dict()])
def test_every_dict_that_torch_saves_is_found(tmp_path, table):
    """A module's state_dict() is an OrderedDict with an attribute of its own."""
    state = {"a": torch.randn(3), "b": torch.randn(2, 2).half()}
    torch.save(table(state), tmp_path / "f.pth")
    assert _same(_read(tmp_path / "f.pth"), state)


def test_what_is_written_is_what_torch_loads(tmp_path):
    state = _state()
    written = _write(tmp_path / "f.pth", state)
    for settings_ in ({"weights_only": True, "mmap": True}, {"weights_only": True}, {"weights_only": False}):
        assert _same(torch.load(tmp_path / "f.pth", **settings_), state)
    assert _same(_read(tmp_path / "f.pth"), state)
    assert sum(written) == (tmp_path / "f.pth").stat().st_size == pth.scan(tmp_path / "f.pth").size


def test_storages_are_stored_aligned_and_with_their_checksums(tmp_path):
    _write(tmp_path / "f.pth", _state())
    with zipfile.ZipFile(tmp_path / "f.pth") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("archive/byteorder") == b"little"
    assert [e.name for e in pth.scan(tmp_path / "f.pth").entries if e.start % 64] == []
    loaded = torch.load(tmp_path / "f.pth", weights_only=True, map_location="meta")  # torch reads the offsets
    offsets = {name: t.untyped_storage()._checkpoint_offset for name, t in loaded.items()}
    assert offsets == {e.name: e.start for e in pth.scan(tmp_path / "f.pth").entries}


def test_equal_contents_make_equal_files(tmp_path):
    state = _state()
    for name, piece in (("a.pth", 5), ("b.pth", 1000)):
        _write(tmp_path / name, state, piece=piece)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_tied_tensors_stay_tied(file, tmp_path):
    found = pth.scan(file)
    assert pth.tied(found) == {"tied": "w.weight", "tied, of another shape": "w.weight"}
    state = _state()
    _write(tmp_path / "f.pth", state, pth.tied(found))
    loaded = torch.load(tmp_path / "f.pth", weights_only=True)
    assert _same(loaded, state)
    loaded["tied"].zero_()
    assert not loaded["w.weight"].any()
    assert not loaded["tied, of another shape"].any()
    assert loaded["two rows"].any()
    assert pth.tied(pth.scan(tmp_path / "f.pth")) == pth.tied(found)


def test_large_members_get_records_of_their_sizes(tmp_path, monkeypatch):
    """Members of 2 GiB and files of more need them; here everything counts as large."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    state = _state()
    written = _write(tmp_path / "f.pth", state)
    assert b"PK\x06\x06" in (tmp_path / "f.pth").read_bytes()  # the directory is one of large files
    assert sum(written) == (tmp_path / "f.pth").stat().st_size
    assert _same(torch.load(tmp_path / "f.pth", weights_only=True, mmap=True), state)
    assert _same(_read(tmp_path / "f.pth"), state)
    assert [e.name for e in pth.scan(tmp_path / "f.pth").entries if e.start % 64] == []


def test_contents_are_asked_for_one_at_a_time_and_in_order(tmp_path):
    asked, sizes = [], []

    def content(name: str):
        before = (tmp_path / "f.pth").stat().st_size if asked else 0
        asked.append(name)
        yield bytes(3_000_000)
        yield bytes(1_000_000)
        sizes.append(before)

    layout = [(name, "F32", (1000, 1000)) for name in "cab"]
    pth.write(tmp_path / "f.pth", layout, content, lambda count: None)
    assert asked == ["c", "a", "b"]
    assert all(size >= n * 4_000_000 for n, size in enumerate(sizes))


def test_content_of_another_size_than_the_layout_says_is_our_bug(tmp_path):
    with pytest.raises(AssertionError, match="has 3 bytes, not 4"):
        pth.write(tmp_path / "f.pth", [("a", "F32", (1,))], lambda name: [b"abc"], lambda count: None)


def test_an_existing_file_is_not_overwritten(file):
    before = file.read_bytes()
    with pytest.raises(FileExistsError):
        _write(file, {"a": torch.ones(2)})
    assert file.read_bytes() == before


_NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
_LAYOUTS = st.dictionaries(_NAMES, st.tuples(_SHAPES, st.sampled_from(list(pickled.DTYPES.values()))), max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=_LAYOUTS)
def test_any_dict_survives_both_ways(tmp_path, layout):
    state = {name: _random(shape, dtype) for name, (shape, dtype) in layout.items()}
    for path in (tmp_path / "saved.pth", tmp_path / "written.pth"):
        path.unlink(missing_ok=True)
    torch.save(state, tmp_path / "saved.pth")
    assert _same(_read(tmp_path / "saved.pth"), state)
    _write(tmp_path / "written.pth", state)
    assert _same(torch.load(tmp_path / "written.pth", weights_only=True), state)


def _rwkv(path: Path, shapes: dict[str, tuple[int, ...]] = RWKV) -> dict[str, Tensor]:
    state = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    torch.save(state, path)
    return state


def test_the_file_of_an_rwkv_model_is_a_base(tmp_path):
    state = _rwkv(tmp_path / "rwkv.pth")
    model = base.open_base(tmp_path / "rwkv.pth")
    assert model.is_pth
    assert (model.folder, model.config, model.companions) == (tmp_path / "rwkv.pth", {}, ())
    assert model.size == (tmp_path / "rwkv.pth").stat().st_size
    assert list(model.entries) == list(state)
    assert {names.is_transposed(name, model.config) for name in model.entries} == {False}
    with (tmp_path / "rwkv.pth").open("rb") as stream:
        entry = model.entries["head.weight"]
        stream.seek(entry.start)
        assert same_bits(tensors.read(stream, entry), state["head.weight"], Promise.STORED)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"model.layers.0.q_proj.weight": (2, 2)},
            r"no emb\.\* and no blocks\.0\.att\.\*, its names are like",
        ),
        (
            {"blocks.0.att.key.disha": (2, 4), "blocks.0.ln1.weight": (4,)},
            r"f\.pth: is an adapter of RWKV-PEFT",
        ),
        ({}, r"no emb\.\* and no blocks\.0\.att\.\*; of other models, load it with transformers"),
    ],
)
def test_other_models_and_adapters_are_no_base(tmp_path, shapes, message):
    _rwkv(tmp_path / "f.pth", shapes)
    with pytest.raises(FormatError, match=message):
        base.open_base(tmp_path / "f.pth")


@pytest.mark.slow
def test_the_author_s_package_computes_the_same_from_a_written_file(tmp_path):
    """A random RWKV-7 of one layer, as `torch.save` and as we write it; the `rwkv` package maps both."""
    pytest.importorskip("rwkv", reason="rwkv is not installed; `make test` does it")
    wide, head, low = 16, 8, 4
    shapes = {"emb.weight": (5, wide), "head.weight": (5, wide), "blocks.0.att.r_k": (wide // head, head)}
    for norm in ("blocks.0.ln0", "blocks.0.ln1", "blocks.0.ln2", "blocks.0.att.ln_x", "ln_out"):
        shapes |= {f"{norm}.weight": (wide,), f"{norm}.bias": (wide,)}
    att = {f"x_{c}": (1, 1, wide) for c in "rwkvag"} | {f"{c}0": (1, 1, wide) for c in "wav"}
    att |= {f"{c}1": (wide, low) for c in "wavg"} | {f"{c}2": (low, wide) for c in "wavg"}
    att |= {"k_k": (1, 1, wide), "k_a": (1, 1, wide)}
    att |= {f"{p}.weight": (wide, wide) for p in ("receptance", "key", "value", "output")}
    shapes |= {f"blocks.0.att.{name}": shape for name, shape in att.items()}
    shapes |= {"blocks.0.ffn.x_k": (1, 1, wide), "blocks.0.ffn.key.weight": (4 * wide, wide)}
    shapes |= {"blocks.0.ffn.value.weight": (wide, 4 * wide)}
    _write(tmp_path / "written.pth", _rwkv(tmp_path / "saved.pth", shapes), piece=1000)
    code = """
import os, sys, warnings
sys.path.append(sys.argv[2])
os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
warnings.simplefilter("ignore")
from rwkv.model import RWKV
from helpers.comparison import Promise, same_bits
a, b = (RWKV(model=name, strategy="cpu fp32").forward([1, 2, 3], None)[0] for name in ("saved", "written"))
sys.exit(not (a.shape == (5,) and a.isfinite().all() and same_bits(a, b, Promise.SAME_PRODUCT) and a.std() > 1e-3))
"""
    run = run_apart(code, tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
