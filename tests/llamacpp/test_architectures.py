"""LoRAs in GGUF on every architecture, beside llama.cpp's own converter, and run by llama.cpp beside transformers."""

import pytest

pytest.importorskip("llama_cpp", reason="llama_cpp is not installed here; `make test-llamacpp` brings it")

import numpy as np
import torch
from gguf import GGUFReader
from running import logits, merge_, read_peft
from tiny_models import MODELS, tiny

from flashbone.files import gguf
from helpers.comparison import relative_error

TOKENS = [3, 17, 5, 60, 22, 9, 41, 8, 13, 2]
# llama.cpp looks GELU up in a table of fp16; everything else it computes in fp32.
TABLES = {"GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"}
TABLES |= {"PhiForCausalLM", "Starcoder2ForCausalLM", "GPT2LMHeadModel"}


def _tensors(file) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(file).tensors}


@pytest.fixture
def lora(converted, architecture):
    return read_peft(converted / architecture / "lora", converted / architecture / "model")


def test_every_architecture_that_is_supported_is_run():
    assert set(MODELS) == set(gguf.ARCHITECTURES)


# GPT-2: the converter takes PEFT's factors for those of the transposed weight, and llama.cpp refuses what it writes.
@pytest.mark.parametrize("architecture", sorted(set(MODELS) - {"GPT2LMHeadModel"}))
def test_files_hold_what_llama_cpp_makes_of_the_same_lora(converted, lora, architecture, tmp_path):
    gguf.write(lora, tmp_path / "ours.gguf")
    ours, theirs = _tensors(tmp_path / "ours.gguf"), _tensors(converted / architecture / "lora.gguf")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * len(lora.factors)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("architecture", MODELS)
def test_llama_cpp_computes_what_the_merged_model_does(converted, lora, architecture, tmp_path):
    gguf.write(lora, tmp_path / "lora.gguf")
    base = converted / architecture / "model.gguf"
    model, tokens = tiny(architecture), torch.tensor([TOKENS])
    with torch.no_grad():
        plain = model(tokens).logits[0]
        merge_(model, lora)
        merged = model(tokens).logits[0]
    allowed = 2e-3 if architecture in TABLES else 1e-5
    assert relative_error(logits(base, TOKENS), plain) < allowed
    assert relative_error(logits(base, TOKENS, tmp_path / "lora.gguf"), merged) < allowed
    assert relative_error(plain, merged) > 0.5


@pytest.mark.parametrize("architecture", [name for name, kind in gguf.ARCHITECTURES.items() if kind.paired])
def test_rows_in_their_own_order_would_be_seen(converted, lora, architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "in_pairs", lambda B, heads: B)
    gguf.write(lora, tmp_path / "lora.gguf")
    model = tiny(architecture)
    merge_(model, lora)
    with torch.no_grad():
        merged = model(torch.tensor([TOKENS])).logits[0]
    assert (
        relative_error(logits(converted / architecture / "model.gguf", TOKENS, tmp_path / "lora.gguf"), merged) > 0.05
    )
