"""Odd and damaged adapters on a base: into LoRAs and GGUF, out of LoRAs, and merged. Right, refused, or never there.

`FLASHBONE_FUZZ=5000` runs that many examples of each.
"""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conversion.test_fuzzing import fields, json_values, many, names, tensors
from flashbone.conversion import convert
from flashbone.errors import FlashboneError
from flashbone.files import lora
from flashbone.merge import merge_checkpoint
from helpers import reference
from helpers.adapter_folders import ROOT, listing
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import relative_error

LAYERS = {
    "model.layers.0.self_attn.o_proj": (6, 4),
    "model.layers.0.mlp.up_proj": (5, 4),
    "model.layers.0.mlp.down_proj": (4, 5),
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_size": 4,
    "tie_word_embeddings": False,
}
VALUES = st.sampled_from([0.0, 1.0, -0.5, 1e-3, 1e4, 1e30, float("nan"), float("inf")])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    folder.mkdir()
    torch.manual_seed(0)  # of a module's fixture, which comes before the seed of each test
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in LAYERS.items()}
    save_file(weights | {"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@st.composite
def bone_adapters(draw: st.DrawFn) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of a BONE adapter that fits the base, but for what was damaged."""
    variant, r = draw(st.sampled_from(VARIANT_NAMES)), draw(st.integers(1, 6))
    state = {}
    for name in draw(st.lists(st.sampled_from([*LAYERS]), min_size=1, unique=True)):
        out, in_ = LAYERS[name]
        shapes = {"bone": (r, out), "mini": (r, 2), "bat-col": (-(-out // r), r, r), "bat-row": (-(-in_ // r), r, r)}
        block = torch.randn(
            shapes.get(variant, (r, r)), generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))
        )
        value = draw(VALUES)
        # A rotation by a block of 1e30 cannot be solved for in fp64; one by NaN is refused.
        block[..., 0] *= 1e4 if variant == "orthogonal" and value == 1e30 else value
        state[f"{ROOT}{name}.bone_block"] = block.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    config = {
        "peft_type": "BONE",
        "r": r,
        "variant": variant,
        "mini_r": 2,
        "init_weights": variant != "bat-col" or "bat",
    }
    if draw(st.booleans()):
        state[f"{ROOT}model.norm.weight"] = torch.randn(draw(st.sampled_from([4, 3])))
        config["modules_to_save"] = ["norm"]
    return config, state


@st.composite
def lora_adapters(draw: st.DrawFn) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of a LoRA; some are bone adapters."""
    r, state = draw(st.integers(1, 5)), {}
    stacked = draw(st.booleans())
    for name in draw(st.lists(st.sampled_from([*LAYERS]), min_size=1, unique=True)):
        out, in_ = LAYERS[name]
        A = torch.eye(r).repeat(1, 6)[:, :in_] if stacked else torch.randn(r, in_)
        state |= {f"{ROOT}{name}.lora_A.weight": A.contiguous(), f"{ROOT}{name}.lora_B.weight": torch.randn(out, r)}
    scale = {"lora_alpha": r * draw(st.sampled_from([1, 2, 3, 0.1])), "use_rslora": draw(st.booleans())}
    return {"peft_type": "LORA", "r": r, "target_modules": ["up_proj"]} | scale, state


def _damaged(data: st.DataObject, config: dict, state: dict[str, torch.Tensor]) -> None:
    lora_fields = st.sampled_from(
        ["lora_alpha", "use_dora", "alpha_pattern", "fan_in_fan_out", "lora_bias", "use_rslora"]
    )
    config |= data.draw(st.dictionaries(fields | lora_fields, json_values, max_size=2))
    for key in data.draw(st.lists(st.sampled_from([*state]), max_size=1)):
        state[key] = data.draw(tensors())
    for name in data.draw(st.lists(names, max_size=1)):
        state[f"{ROOT}{name}.lora_A.weight".encode("utf-8", "replace").decode()] = data.draw(tensors())


def _place(folder: Path, config: dict, state: dict[str, torch.Tensor]) -> Path:
    (folder / "in").mkdir()
    (folder / "in" / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, folder / "in" / "adapter_model.safetensors")
    return folder / "in"


def _deltas(config: dict, state: dict[str, torch.Tensor], base: Path) -> dict[str, torch.Tensor]:
    """Of an undamaged adapter, by the oracle."""
    W = {name.removesuffix(".weight"): tensor for name, tensor in load_file(base / "model.safetensors").items()}
    found = {}
    for key, block in state.items():
        name = key.removeprefix(ROOT).removesuffix(".bone_block")
        if name in LAYERS:
            found[name] = reference.delta(config["variant"], W[name], block)
    return found


def _failure(folder: Path, act) -> str:
    """What was refused, in one line, and nothing left; empty where it succeeded."""
    before, problem = listing(folder), ""
    try:
        act()
    except FlashboneError as error:
        problem = str(error)
    assert "\n" not in problem
    assert not problem or listing(folder) == before
    return problem


@many
@given(st.data())
def test_an_adapter_becomes_a_lora_as_near_as_asked_or_is_refused(base, data):
    config, state = data.draw(bone_adapters())
    intact = data.draw(st.booleans())
    if not intact:
        _damaged(data, config, state)
    size = data.draw(st.sampled_from([{}, {"rank": 2}, {"rank": 9}, {"error": 0.5}, {"error": 1e-3}]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, out = _place(folder, config, state), folder / "out"
        reports = []
        if _failure(folder, lambda: reports.append(convert(source, out, "lora", base=base, **size))):
            return
        got = lora.read(out)
        assert all(torch.isfinite(tensor).all() for pair in got.factors.values() for tensor in pair)
        assert {A.shape[0] for A, _ in got.factors.values()} == {reports[0].rank}
        if not intact:
            return
        said = {error.name: error.error for error in reports[0].errors}
        for module, delta in _deltas(config, state, base).items():
            A, B = got.factors[module]
            missed = relative_error(B.double() @ A.double(), delta) if delta.any() else float((B @ A).abs().max())
            assert abs(missed - said.get(module, 0.0)) < 1e-4
            assert missed <= size.get("error", 1.0) + 1e-6


@many
@given(st.data())
def test_a_lora_keeps_its_product_or_is_refused(base, data):
    config, state = data.draw(lora_adapters())
    product = {
        name: state[f"{ROOT}{name}.lora_B.weight"].double() @ state[f"{ROOT}{name}.lora_A.weight"].double()
        for name in LAYERS
        if f"{ROOT}{name}.lora_A.weight" in state
    }
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    intact = data.draw(st.booleans())
    if not intact:
        _damaged(data, config, state)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = _place(folder, config, state)
        for target in ("lora", "peft", "gguf"):
            out = folder / "out"
            problem = _failure(folder, lambda out=out, to=target: convert(source, out, to, base=base))
            assert not (intact and problem and target != "peft"), problem
            if problem:
                continue
            if intact and target == "lora":
                for module, (A, B) in lora.read(out).factors.items():
                    assert relative_error(B.double() @ A.double(), product[module] * scale) < 1e-6
            if target == "gguf":
                held = {tensor.name for tensor in GGUFReader(out / "adapter.gguf").tensors}
                assert len(held) == 2 * len(product) or not intact
            shutil.rmtree(out)


@many
@given(st.data())
def test_an_adapter_is_merged_rightly_or_refused(base, data):
    config, state = data.draw(bone_adapters())
    intact = data.draw(st.booleans())
    if not intact:
        _damaged(data, config, state)
    weight = data.draw(st.sampled_from([1.0, -0.5, 2.0]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, out = _place(folder, config, state), folder / "out"
        if _failure(folder, lambda: merge_checkpoint(base, source, out, weights=[weight])):
            return
        before, after = (load_file(f / "model.safetensors") for f in (base, out))
        assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
        assert all(torch.isfinite(tensor).all() for tensor in after.values())
        if intact:
            for module, delta in _deltas(config, state, base).items():
                want = before[f"{module}.weight"].double() + weight * delta
                assert relative_error(after[f"{module}.weight"], want) < 1e-5
