"""PEFT's folders of plain LoRAs: what is read, what is refused, and which are adapters of the family."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashbone import variants
from flashbone.conversion import factors
from flashbone.errors import ConfigError, FormatError
from flashbone.files import lora
from flashbone.files.lora import Lora
from flashbone.variants.lowrank import pad
from helpers.adapter_folders import ROOT, listing
from helpers.blocks import random_block
from helpers.comparison import Promise, close, same_bits

HERE = Path("adapter")


def stacked(out: int, in_: int, r: int, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = variants.get("bone").factors(random_block("bone", out, in_, r, dtype=torch.float32), out, in_)
    return pad(A, B, rank or r)


def folder(path: Path, loras: dict[str, tuple[torch.Tensor, torch.Tensor]], others=None, **fields) -> Path:
    state = {
        f"{ROOT}{n}.lora_{part}.weight": t for n, pair in loras.items() for part, t in zip("AB", pair, strict=True)
    }
    save_file(state | (others or {}), path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q"]} | fields
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def free(rank: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, 6, dtype=dtype), torch.randn(8, rank, dtype=dtype)


def test_what_is_written_is_read_again_bit_for_bit(tmp_path):
    held = Lora(
        {"h.q": free(), "emb": (torch.randn(4, 9), torch.randn(6, 4)), "h.c": free()},
        {"h.q.bias": torch.randn(8), "head.weight": torch.randn(2, 8), "head.bias": torch.randn(2)},
        "org/model",
        embeddings=frozenset({"emb"}),
        target_modules=("c", "emb", "q"),
        modules_to_save=("head",),
        task_type="SEQ_CLS",
    )
    lora.write(held, tmp_path)
    got = lora.read(tmp_path)
    assert all(
        same_bits(a, b, Promise.STORED)
        for n in held.factors
        for a, b in zip(held.factors[n], got.factors[n], strict=True)
    )
    assert all(same_bits(got.replacements[name], tensor, Promise.STORED) for name, tensor in held.replacements.items())
    for name in (
        "base_model",
        "embeddings",
        "target_modules",
        "modules_to_save",
        "task_type",
        "rank",
        "bias",
        "conv1d",
    ):
        assert getattr(got, name) == getattr(held, name), name
    assert got.bias == "lora_only"


def test_the_biases_that_a_lora_holds_are_named_as_peft_names_them():
    saved = {"head.weight": torch.ones(2, 8), "head.bias": torch.ones(2)}
    for replacements, bias in (
        ({}, "none"),
        (saved, "none"),
        (saved | {"q.bias": torch.ones(8)}, "lora_only"),
        ({"q.bias": torch.ones(8), "k.bias": torch.ones(8)}, "all"),
    ):
        assert Lora({"q": free()}, replacements, modules_to_save=("head",)).bias == bias


def test_a_bias_of_an_adapted_layer_has_the_name_that_it_has_inside_of_peft(tmp_path):
    lora.write(Lora({"q": free()}, {"q.bias": torch.ones(8), "k.bias": torch.ones(8)}), tmp_path)
    assert {f"{ROOT}q.base_layer.bias", f"{ROOT}k.bias"} <= set(load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("is_conv1d", [True, False])
def test_layers_that_keep_in_by_out_are_all_but_the_embeddings(tmp_path, is_conv1d):
    embedding = {f"{ROOT}e.lora_embedding_A": torch.ones(4, 9), f"{ROOT}e.lora_embedding_B": torch.ones(6, 4)}
    got = lora.read(folder(tmp_path, {"q": free(), "k": free()}, embedding, fan_in_fan_out=is_conv1d))
    assert got.conv1d == (frozenset("qk") if is_conv1d else frozenset())
    assert got.embeddings == frozenset("e")


def test_factors_of_one_rank_are_the_file_s_own(tmp_path):
    pair = free()
    folder(tmp_path, {"q": pair, "k": free(2)}, rank_pattern={"k": 2}, alpha_pattern={"k": 2})
    got = lora.read(tmp_path).factors
    assert same_bits(got["q"][0], pair[0], Promise.STORED)
    assert (got["q"][0].shape, got["k"][0].shape) == ((4, 6), (4, 6))
    assert not got["k"][0][2:].any()


def test_two_values_of_one_parameter_are_refused_unless_they_are_equal(tmp_path):
    bias = {f"{ROOT}q.base_layer.bias": torch.ones(8), f"{ROOT}q.bias": torch.ones(8)}
    assert same_bits(
        lora.read(folder(tmp_path, {"q": free()}, bias, bias="all")).replacements["q.bias"],
        torch.ones(8),
        Promise.STORED,
    )
    folder(tmp_path, {"q": free()}, bias | {f"{ROOT}q.bias": torch.zeros(8)}, bias="all")
    with pytest.raises(FormatError, match=r"the file holds two different values of q\.bias"):
        lora.read(tmp_path)


@pytest.mark.parametrize(("dtype", "alpha", "wanted"), [(torch.bfloat16, 8, torch.bfloat16), (torch.bfloat16, 3, None)])
def test_a_scaling_is_multiplied_in_without_rounding_where_it_can_be(tmp_path, dtype, alpha, wanted):
    A, B = free(dtype=dtype)
    got = lora.read(folder(tmp_path, {"q": (A, B)}, lora_alpha=alpha)).factors["q"]
    assert got[1].dtype == (wanted or torch.float32)
    assert same_bits(got[1].float(), B.float() * (alpha / 4), Promise.EXACT)
    assert same_bits(got[0], A, Promise.STORED)


def test_patterns_and_rslora_are_read_and_the_ranks_made_one(tmp_path):
    loras = {"a.q": free(), "b.q": free(2)}
    fields = {"rank_pattern": {"b.q": 2}, "alpha_pattern": {"^b.*": 16}, "use_rslora": True, "lora_alpha": 6}
    got = lora.read(folder(tmp_path, loras, **fields))
    assert got.rank == 4
    for name, scale in {"a.q": 6 / 4**0.5, "b.q": 16 / 2**0.5}.items():
        A, B = got.factors[name]
        assert close(B @ A, scale * loras[name][1] @ loras[name][0])


def test_peft_reads_the_same_delta(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 8), "p": torch.nn.Linear(8, 6)})
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q", "p"], rank_pattern={"p": 3}, init_lora_weights=False)
    live = get_peft_model(model, config)
    live.save_pretrained(tmp_path)
    got = lora.read(tmp_path)
    for name in "qp":
        A, B = got.factors[name]
        want = live.base_model.model[name].get_delta_weight("default")
        assert close(B @ A, want)
    assert got.target_modules == ("p", "q") or set(got.target_modules) == {"p", "q"}


def test_pickled_folders_read_like_safetensors(tmp_path):
    folder(tmp_path, {"q": free()})
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    want = lora.read(tmp_path)
    weights.unlink()
    assert same_bits(lora.read(tmp_path).factors["q"][0], want.factors["q"][0], Promise.STORED)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LOHA"}, ["this is a LOHA adapter, wanted LORA"]),
        (
            {"use_dora": True, "lora_bias": True},
            ["use_dora: got True, wanted false", "lora_bias: got True", "merge such an adapter with PEFT"],
        ),
        (
            {"alora_invocation_tokens": [1, 2]},
            ["more than a plain LoRA: 'alora_invocation_tokens': [1, 2]; merge such"],
        ),
        ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ({"target_parameters": ["up"]}, ["'target_parameters': ['up']"]),
        ({"some_new_variant": {"x": 1}}, ["some_new_variant"]),
        (
            {"init_lora_weights": "pissa_niter_4"},
            ["init_lora_weights: got 'pissa_niter_4', wanted one that leaves the base unchanged"],
        ),
        ({"r": 0, "bias": "some"}, ["r: got 0", "bias: got 'some'"]),
        ({"r": True}, ["r: got True"]),
        ({"lora_alpha": "16"}, ["lora_alpha: got '16', wanted a number"]),
        ({"lora_alpha": 10**400}, ["lora_alpha: got 1000"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha: got nan"]),
        ({"rank_pattern": {"(": 2}}, ["rank_pattern: got {'(': 2}"]),
        ({"alpha_pattern": {"q": None}}, ["alpha_pattern"]),
        ({"modules_to_save": "head"}, ["modules_to_save: got 'head', wanted names"]),
        ({"target_modules": 3, "task_type": 4}, ["target_modules: got 3", "task_type: got 4"]),
        ({"use_rslora": "yes", "fan_in_fan_out": 1}, ["use_rslora", "fan_in_fan_out"]),
        ({"r": 3}, ["q: got A of shape (4, 6) and B of shape (8, 4), wanted (3, in) and (out, 3)"]),
    ],
)
def test_configurations_that_are_no_plain_lora_are_refused_by_name(tmp_path, fields, words):
    folder(tmp_path, {"q": free()}, **fields)
    with pytest.raises(FormatError) as caught:
        lora.read(tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({f"{ROOT}q.lora_magnitude_vector": torch.ones(8)}, "unknown key 'base_model.model.q.lora_magnitude_vector'"),
        ({"q.lora_A.weight": torch.ones(4, 6)}, "unknown key 'q.lora_A.weight'"),
        (
            {f"{ROOT}p.lora_A.weight": torch.ones(4, 6)},
            "p: the file holds its lora_A.weight, wanted lora_A.weight and lora_B.weight",
        ),
        ({f"{ROOT}p.weight": torch.ones(4, 6)}, "unknown key 'base_model.model.p.weight'"),
        (
            {f"{ROOT}q.lora_embedding_A": torch.ones(4, 6)},
            "q: the file holds its lora_A.weight and lora_B.weight and lora_embedding_A, wanted lora_embedding_A and",
        ),
        ({f"{ROOT}p.lora_A.weight": torch.ones(4, 6, dtype=torch.int8)}, "wanted floating point numbers"),
        (
            {f"{ROOT}c.lora_A.weight": torch.ones(4, 6, 3, 3), f"{ROOT}c.lora_B.weight": torch.ones(8, 4, 1, 1)},
            "those of a convolution",
        ),
    ],
)
def test_strange_tensors_are_refused_by_name(tmp_path, others, words):
    folder(tmp_path, {"q": free()}, others)
    with pytest.raises(FormatError, match=r"adapter_model.safetensors") as caught:
        lora.read(tmp_path)
    assert words in str(caught.value)


def test_a_folder_without_factors_or_weights_is_refused(tmp_path):
    folder(tmp_path, {})
    with pytest.raises(FormatError, match="it holds no lora_A and lora_B"):
        lora.read(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match="has no weights"):
        lora.read(tmp_path)
    with pytest.raises(FormatError, match="no such adapter folder"):
        lora.read(tmp_path / "nowhere")


def test_what_a_folder_has_no_place_for_is_refused_before_anything_is_written(tmp_path):
    held = Lora({"q": free()}, {"blocks.0.att.time_decay": torch.ones(3)})
    with pytest.raises(FormatError, match=r"no place for blocks\.0\.att\.time_decay"):
        lora.write(held, tmp_path)
    assert listing(tmp_path) == []


def test_more_rank_is_zeros_and_less_is_refused():
    held = Lora({"q": free()})
    assert factors.resized(held, None, None, HERE) is held
    wide = factors.resized(held, 7, None, HERE)
    assert wide.rank == 7
    assert close(wide.factors["q"][1] @ wide.factors["q"][0], held.factors["q"][1] @ held.factors["q"][0])
    assert wide.factors["q"][0][4:].count_nonzero() == 0
    with pytest.raises(ConfigError, match="rank 3: this LoRA has rank 4, and may be padded but not cut"):
        factors.resized(held, 3, None, HERE)
    with pytest.raises(ConfigError, match=r"error 0\.1: this LoRA has rank 4"):
        factors.resized(held, None, 0.1, HERE)


@pytest.mark.parametrize("rank", [4, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bone_adapter_comes_back_from_its_lora_bit_for_bit(tmp_path, rank, dtype):
    shapes = {"a": (8, 12, 4), "b": (8, 9, 3), "c": (5, 3, 4), "d": (7, 1, 4), "e": (6, 6, 1)}
    blocks = {name: random_block("bone", *shape, dtype=dtype) for name, shape in shapes.items()}
    bone = variants.get("bone")
    pairs = {name: bone.factors(block, *shapes[name][:2]) for name, block in blocks.items()}
    held = Lora({name: pad(A, B, rank) for name, (A, B) in pairs.items()}, {"a.bias": torch.ones(8)}, "org/base")
    lora.write(held, tmp_path)
    got = factors.to_adapter(lora.read(tmp_path), tmp_path)
    assert got.variant == bone
    assert {name: block.dtype for name, block in got.blocks.items()} == dict.fromkeys(blocks, dtype)
    assert all(same_bits(got.blocks[name], block, Promise.EXACT) for name, block in blocks.items())
    assert (got.config["r"], got.config["bias"], got.base_model) == (4, "bone_only", "org/base")
    assert got.config["rank_pattern"] == {r"\Ab": 3, r"\Ae": 1}


def test_a_lora_with_a_free_a_is_no_adapter_of_the_family():
    almost = stacked(8, 12, 4)
    almost[0][1, 5] = 0.999
    twisted = stacked(8, 12, 4, rank=6)
    twisted[1][0, 5] = 1.0  # of a row of A that is zero: the function is the same, the file says something else
    for name, pair in {
        "free": free(),
        "almost": almost,
        "twisted": twisted,
        "ones": (torch.ones(3, 6), free(3)[1]),
    }.items():
        with pytest.raises(FormatError, match=rf"adapter: a LoRA with a trained A is not a Bone adapter \({name}\)"):
            factors.to_adapter(Lora({"q": stacked(8, 12, 4), name: pair}), HERE)
