"""LoRAs in GGUF, read back with the package that wrote them; tests/llamacpp has llama.cpp itself do so."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from flashbone.errors import BackendError, FormatError
from flashbone.files import gguf
from flashbone.files.lora import Lora
from helpers.comparison import Promise, same_bits

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "gguf.json").read_text())
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def _factors(out: int, in_: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    """Every number once, so that nothing can change places unseen."""
    A = torch.arange(float(rank * in_)).reshape(rank, in_)
    return A, A.numel() + torch.arange(float(out * rank)).reshape(out, rank)


def _lora(*names: str, config: dict | None = None, **fields) -> Lora:
    return Lora({name: _factors(16, 12) for name in names}, base_config=LLAMA | (config or {}), **fields)


def _tensors(file: Path) -> dict[str, Tensor]:
    return {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in GGUFReader(file).tensors}


def _fields(file: Path) -> dict:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("architecture", GOLDEN)
def test_layers_lie_where_the_converter_of_llama_cpp_puts_them(architecture, tmp_path):
    case = GOLDEN[architecture]
    factors = {module: _factors(out, in_) for module, (_, out, in_, _) in case["layers"].items()}
    gguf.write(Lora(factors, base_config=case["config"]), tmp_path / "lora.gguf")
    got = _tensors(tmp_path / "lora.gguf")
    want = {}
    for module, (tensor, out, _, rows) in case["layers"].items():
        A, B = factors[module]
        want |= {f"{tensor}.lora_a": A, f"{tensor}.lora_b": B[rows or list(range(out))]}
    assert got.keys() == want.keys()
    assert all(same_bits(got[name], want[name], Promise.EXACT) for name in want)
    assert _fields(tmp_path / "lora.gguf")["general.architecture"] == gguf.ARCHITECTURES[architecture].name


def test_the_golden_file_has_every_architecture_but_the_one_that_the_converter_gets_wrong():
    assert set(gguf.ARCHITECTURES) - set(GOLDEN) == {"GPT2LMHeadModel"}


def test_layers_of_gpt2_are_not_transposed(tmp_path):
    config = {"architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 2}
    sizes = {"attn.c_attn": (24, 8), "attn.c_proj": (8, 8), "mlp.c_fc": (32, 8), "mlp.c_proj": (8, 32)}
    factors = {f"transformer.h.0.{name}": _factors(*size) for name, size in sizes.items()}
    gguf.write(Lora(factors, base_config=config, conv1d=frozenset(factors)), tmp_path / "lora.gguf")
    got = _tensors(tmp_path / "lora.gguf")
    names = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    for name, (A, B) in zip(names, factors.values(), strict=True):
        assert same_bits(got[f"blk.0.{name}.weight.lora_a"], A, Promise.STORED)
        assert same_bits(got[f"blk.0.{name}.weight.lora_b"], B, Promise.STORED)


def test_the_file_says_what_it_is(tmp_path):
    gguf.write(_lora(Q, base_model="org/some-base"), tmp_path / "lora.gguf")
    fields = _fields(tmp_path / "lora.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 3  # the rank: llama.cpp scales by alpha / rank
    assert fields["general.base_model.0.name"] == "some-base"
    assert fields["general.file_type"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_any_dtype_are_held_exactly(tmp_path, dtype):
    factors = tuple(torch.randn(size).to(dtype) for size in ((3, 12), (16, 3)))
    factors = tuple(factor.float().to(dtype) for factor in factors)
    gguf.write(Lora({DOWN: factors}, base_config=LLAMA), tmp_path / "lora.gguf")
    got = _tensors(tmp_path / "lora.gguf")
    assert same_bits(got["blk.0.ffn_down.weight.lora_a"].to(dtype), factors[0], Promise.EXACT)
    assert same_bits(got["blk.0.ffn_down.weight.lora_b"].to(dtype), factors[1], Promise.EXACT)
    assert got["blk.0.ffn_down.weight.lora_a"].dtype == torch.float32


def test_names_of_a_body_without_a_head_are_found(tmp_path):
    assert gguf.tensor_names(_lora("layers.0.mlp.down_proj")) == {"layers.0.mlp.down_proj": "blk.0.ffn_down.weight"}


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (_lora(Q, replacements={"model.norm.weight": torch.ones(2)}), "replace the base's: model.norm.weight"),
        (_lora(Q, "model.embed_tokens", embeddings=frozenset({"model.embed_tokens"})), "tables: model.embed_tokens"),
        (_lora(Q, "model.embed_tokens"), "no place of their own in a GGUF of llama: model.embed_tokens"),
        (_lora(Q, "score", "model.layers.2.mlp.up_proj"), "GGUF of llama: score, model.layers.2.mlp.up_proj"),
        (_lora(Q, "layers.1.self_attn.q_proj"), "named twice: layers.1.self_attn.q_proj"),
        (_lora("lm_head", config={"tie_word_embeddings": True}), "tied to the embedding table: lm_head"),
        (_lora("lm_head", config={"architectures": ["Starcoder2ForCausalLM"]}), "tied to the embedding table: lm_head"),
        (_lora(Q, config={"num_attention_heads": 3}), f"no pairs of 3 heads: {Q}"),
        (_lora(Q, config={"num_attention_heads": "4"}), f"no pairs of 0 heads: {Q}"),
        (Lora({Q: _factors(16, 12), DOWN: _factors(16, 12, 2)}, base_config=LLAMA), f"not of rank 3: {DOWN}"),
        (_lora(Q, config={"architectures": ["MixtralForCausalLM"]}), "the base is a MixtralForCausalLM, wanted one of"),
        (_lora(Q, config={"architectures": None}), "names no architectures"),
        (_lora(Q, config={"architectures": [["LlamaForCausalLM"]]}), "wanted one of LlamaForCausalLM"),
        (_lora(Q, config={"num_hidden_layers": "2"}), "number of layers"),
        (Lora({Q: _factors(16, 12)}), "give the base model's folder"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_by_name_and_nothing_written(tmp_path, lora, words):
    with pytest.raises(FormatError) as caught:
        gguf.write(lora, tmp_path / "lora.gguf")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_everything_that_is_wrong_is_named_at_once(tmp_path):
    with pytest.raises(FormatError) as caught:
        gguf.write(_lora(Q, "score", "lm_head", replacements={"a.bias": torch.ones(2)}), tmp_path / "lora.gguf")
    assert all(name in str(caught.value) for name in ("score", "a.bias", "merge it"))
    assert "lm_head" not in str(caught.value)  # not tied: it has a place


def test_without_the_package_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_gguf(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError("no gguf")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(BackendError, match="pip install gguf"):
        gguf.write(_lora(Q), tmp_path / "lora.gguf")


def test_an_architecture_that_the_package_is_too_old_for_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(gguf.ARCHITECTURES, "LlamaForCausalLM", gguf.Architecture("llama-of-tomorrow"))
    with pytest.raises(BackendError, match=r"this version does not know llama-of-tomorrow; pip install --upgrade gguf"):
        gguf.write(_lora(DOWN), tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
