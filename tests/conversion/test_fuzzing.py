"""Damaged and odd adapters through the whole of `convert`: what comes out is right, or refused, or never there at all.

Each example writes one adapter, damages it, and converts it to every format. `FLASHBONE_FUZZ=5000` runs that many.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flashbone import cli, variants
from flashbone.conversion import convert
from flashbone.errors import FlashboneError
from flashbone.files import reading
from flashbone.files.adapter import Adapter
from helpers import reference
from helpers.adapter_folders import ROOT, listing
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, relative_error, same_bits

EXAMPLES = int(os.environ.get("FLASHBONE_FUZZ", "0"))
many = settings(
    max_examples=EXAMPLES or 60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=not EXAMPLES
)
# LoRAs and GGUF need a base: test_fuzzing_with_base.py.
TARGETS = ("peft", "miss", "rwkv-peft")
NAMES = ("blocks.0.att.key", "model.layers.0.q", "layers.1.q", "q", "x.q", "emb")
ODD_NAMES = ("a.base_layer.b", "q.bone_block", "(", "", "blocks.0.ffn.key.disha")
WIDTH = 6

names = st.sampled_from(NAMES + ODD_NAMES) | st.text(max_size=6)
shapes = st.lists(st.integers(0, 5), max_size=4)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
dtypes = st.sampled_from([*FLOATS, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8])
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["bat", "mini", "q"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=4,
)
FIELDS = """
    r variant init_weights mini_r bias dropout miss_dropout target_modules modules_to_save rank_pattern peft_type
    base_model_name_or_path target_parameters parameters_to_save task_type bottleneck_size use_orthogonal
    orthogonal_eps auto_mapping exclude_modules layers_to_transform revision inference_mode layers_pattern
"""
fields = st.sampled_from(FIELDS.split()) | st.text(max_size=5)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(dtypes)
    shape = draw(shapes)
    return (torch.arange(1, 1 + int(torch.Size(shape).numel())).reshape(shape) / 7).to(dtype)


@st.composite
def blocks(draw: st.DrawFn, variant: str, r: int) -> torch.Tensor:
    out = draw(st.integers(1, WIDTH))
    shapes = {"bone": (r, out), "mini": (r, 2), "bat-col": (-(-out // r), r, r), "bat-row": (-(-WIDTH // r), r, r)}
    shape = shapes.get(variant, (r, r))
    block = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    return block.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@st.composite
def adapters(draw: st.DrawFn) -> tuple[str, dict, dict[str, torch.Tensor]]:
    """Format, config and tensors of an adapter that is mostly as it should be."""
    form = draw(st.sampled_from(TARGETS))
    known = {"peft": VARIANT_NAMES, "miss": ("bone", "mini", "bat-col"), "rwkv-peft": ("bone", "bat-row")}[form]
    variant, r = draw(st.sampled_from(known)), draw(st.integers(1, 4))
    modules = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    suffix = {"peft": "bone_block", "miss": "miss_block", "rwkv-peft": "disha"}[form]
    root = "" if form == "rwkv-peft" else ROOT
    state = {f"{root}{name}.{suffix}": draw(blocks(variant, r)) for name in modules}
    init = {"bat-col": "bat", "mini": "mini" if form == "miss" else True}.get(variant, True)
    config = {"peft_type": "BONE" if form == "peft" else "MISS", "r": r, "init_weights": init, "mini_r": 2}
    config |= {"variant": variant} if form == "peft" else {}
    for name in draw(st.lists(st.sampled_from(["ln_out", "blocks.0.ln1", "q.base_layer", "embed_tokens"]), max_size=2)):
        leaf = draw(st.sampled_from(["weight", "bias"]))
        state[f"{root}{name}.{leaf}"] = torch.randn(WIDTH)
    if any(key.endswith("ias") for key in state):
        config["bias"] = draw(st.sampled_from(["none", "all", "bone_only" if form == "peft" else "MiSS_only"]))
    config["modules_to_save"] = draw(st.sampled_from([None, ["ln_out"], ["ln_out", "blocks.0.ln1"]]))
    return form, config, state


@st.composite
def damage(draw: st.DrawFn, config: dict, state: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    """Other fields, other keys, other tensors."""
    config |= draw(st.dictionaries(fields, json_values, max_size=2))
    for key in draw(st.lists(st.sampled_from(list(state)), max_size=1)):
        state[key] = draw(tensors())
    for name in draw(st.lists(names, max_size=1)):
        key = draw(st.sampled_from(["", ROOT])) + name + draw(st.sampled_from(["", ".weight", ".bone_block", ".disha"]))
        if not any("\ud800" <= letter <= "\udfff" for letter in key):
            state[key] = draw(tensors())
    return config, state


def place(folder: Path, form: str, config: dict, state: dict[str, torch.Tensor], pickled: bool) -> Path:
    """Write it; returns what to convert."""
    if form == "rwkv-peft":
        torch.save(state, folder / "in.pth")
        return folder / "in.pth"
    (folder / "in").mkdir()
    (folder / "in" / "adapter_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(state, folder / "in" / "adapter_model.bin")
    else:
        save_file(state, folder / "in" / "adapter_model.safetensors")
    return folder / "in"


def check(folder: Path, source: Path) -> int:
    """Convert to every format; what succeeds means the same, what fails leaves nothing behind. Returns successes."""
    before, done = listing(folder), 0
    for target in TARGETS:
        out = folder / ("out.pth" if target == "rwkv-peft" else "out")
        failure = ""
        try:
            report = convert(source, out, target)
        except FlashboneError as error:
            failure = str(error)
        if failure:
            assert "\n" not in failure
            assert listing(folder) == before
            continue
        assert [name for name in listing(folder) if not name.startswith(out.name)] == before
        got, want = reading.read(out)[1], reading.read(source)[1]
        assert isinstance(got, Adapter)
        assert isinstance(want, Adapter)
        assert (report.variant, report.modules) == (want.variant.name, len(want.blocks))
        assert_same(got, want)
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        done += 1
    return done


def assert_same(got: Adapter, want: Adapter) -> None:
    assert got.variant == want.variant
    assert (got.transposed, got.parameters) in ((want.transposed, want.parameters), (frozenset(), frozenset()))
    pairs = [*zip(sorted(got.blocks.items()), sorted(want.blocks.items()), strict=True)]
    pairs += zip(sorted(got.replacements.items()), sorted(want.replacements.items()), strict=True)
    for (ours, tensor), (theirs, wanted) in pairs:
        assert f".{theirs}".endswith(f".{ours}")  # rwkv-peft takes a leading part off
        assert tensor.dtype == wanted.dtype
        assert same_bits(tensor.nan_to_num(), wanted.nan_to_num(), Promise.STORED)
    assert len({len(theirs) - len(ours) for (ours, _), (theirs, _) in pairs}) == 1
    for (_, block), (_, wanted) in pairs[: len(got.blocks)]:
        assert_same_delta(got, block, want, wanted)


def assert_same_delta(got: Adapter, ours: torch.Tensor, want: Adapter, theirs: torch.Tensor) -> None:
    name = want.variant.name
    if name == "orthogonal" or ours.ndim != variants.dimensions(want.variant) or not torch.isfinite(ours.float()).all():
        return  # compared to the bit above; the oracle's inverse needs finite blocks
    rows = len(ours) * ours.shape[-1] if name == "bat-col" else ours.shape[1] if name == "bone" else 5
    columns = len(ours) * ours.shape[-1] if name == "bat-row" else 7
    W = torch.randn(rows, columns, dtype=torch.float64)
    delta = got.variant.delta(W, ours.double())
    assert relative_error(delta, reference.delta(name, W, theirs)) < 1e-9


@many
@given(st.data())
def test_odd_adapters_are_converted_rightly_or_refused(data):
    form, config, state = data.draw(adapters())
    if data.draw(st.booleans()):
        config, state = data.draw(damage(config, state))
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), place(Path(folder), form, config, state, pickled=data.draw(st.booleans())))


@many
@given(st.data())
def test_damaged_bytes_are_converted_rightly_or_refused(data):
    form, config, state = data.draw(adapters())
    with tempfile.TemporaryDirectory() as folder:
        source = place(Path(folder), form, config, state, pickled=data.draw(st.booleans()))
        files = [source] if source.is_file() else sorted(source.iterdir())
        file = data.draw(st.sampled_from(files))
        raw = bytearray(file.read_bytes())
        if data.draw(st.booleans()):
            raw = raw[: data.draw(st.integers(0, len(raw)))]
        for _ in range(data.draw(st.integers(0, 3))):
            if raw:
                at = data.draw(st.integers(0, min(len(raw), 600) - 1) | st.integers(0, len(raw) - 1))
                raw[at] = data.draw(st.integers(0, 255))
        file.write_bytes(raw)
        check(Path(folder), source)


@pytest.mark.slow
@many
@given(st.data())
def test_the_command_answers_damage_with_one_line_and_a_code(data):
    form, config, state = data.draw(adapters())
    config, state = data.draw(damage(config, state))
    target = data.draw(st.sampled_from(TARGETS))
    with tempfile.TemporaryDirectory() as folder:
        source = place(Path(folder), form, config, state, pickled=data.draw(st.booleans()))
        before, said, failed = listing(Path(folder)), io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
            code = cli.main(["convert", str(source), str(Path(folder) / "out"), "--to", target, "--json"])
        if code == 0:
            assert json.loads(said.getvalue())["format"] == target
            assert (Path(folder) / "out" / "README.md").is_file()
        else:
            assert code == 1
            assert failed.getvalue().count("\n") == 1
            assert listing(Path(folder)) == before


def test_the_examples_are_not_all_refused(tmp_path):
    """Undamaged adapters of every format convert to some format at least, so that the above compares something."""
    for i, form in enumerate(TARGETS):
        suffix = {"peft": "bone_block", "miss": "miss_block", "rwkv-peft": "disha"}[form]
        root = "" if form == "rwkv-peft" else ROOT
        state = {f"{root}blocks.0.att.key.{suffix}": torch.randn(3, 6)}
        config = {"peft_type": "BONE" if form == "peft" else "MISS", "r": 3}
        (tmp_path / str(i)).mkdir()
        assert check(tmp_path / str(i), place(tmp_path / str(i), form, config, state, pickled=False)) == len(TARGETS)
