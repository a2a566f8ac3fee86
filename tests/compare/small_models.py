"""Small models for the tests of methods and sizes: all offline, with sizes that no power of two divides."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from flashbone.compare.methods import METHODS

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RXN = find_spec("rxnmapper")
# PEFT's other methods are of the second tier.
FIRST = ("bone", "mini", "bat-col", "bat-row", "orthogonal", "lora", "full")
NAMES = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
MINILM = Path(__file__).parents[2] / ".cache/classification/minilm"


def llama(**fields) -> LlamaConfig:
    """Grouped queries; inputs of 36 and 60."""
    sizes = {"hidden_size": 36, "intermediate_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaConfig(**{"vocab_size": 40, "num_hidden_layers": 2, **sizes, **fields})


def gpt2() -> GPT2Config:
    """Conv1D layers; tied embeddings."""
    return GPT2Config(n_embd=18, n_layer=2, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)


def bert() -> BertConfig:
    """A classifier of three labels."""
    sizes = {"hidden_size": 36, "intermediate_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes)


def albert() -> Path:
    """rxnmapper's pretrained ALBERT, whose layers share their weights, with a new classifier."""
    if RXN is None:
        pytest.skip("rxnmapper, which ships a small pretrained ALBERT, is not installed")
    return Path(RXN.submodule_search_locations[0]) / "models/transformers/albert_heads_8_uspto_all_1310k"


def minilm() -> Path:
    if not (MINILM / "config.json").is_file():
        pytest.skip("MiniLM is not there; examples/classification/prepare.py writes it")
    return MINILM


def real(source, task_type="CAUSAL_LM"):
    """The model with weights, the same ones each time."""
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if task_type == "SEQ_CLS" else AutoModelForCausalLM
    if isinstance(source, Path):
        return auto.from_pretrained(source).eval()
    return auto.from_config(source).eval()


def ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(1))
