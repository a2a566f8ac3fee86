"""The methods of a comparison on small models: what they attach, where they start, what trains, what is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flashbone.compare.methods import METHODS, attach

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = [name for name, method in METHODS.items() if not method.is_bound]
# A size each, which fits the layers of the tiny Llama (inputs of 36 and 60).
SIZES = {name: 2 if METHODS[name].has_size else None for name in ADAPTERS} | {"oft": 6, "boft": 6}


def llama(**fields) -> LlamaConfig:
    """Grouped queries, and sizes that no power of two divides."""
    sizes = {"hidden_size": 36, "intermediate_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=40, num_hidden_layers=2, **sizes, **fields)


def real(config, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def ids():
    return torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def attached(name, seed=0, **settings):
    method = METHODS[name]
    return attach(real(llama()), method, method.config(SIZES.get(name), LINEARS, "CAUSAL_LM", settings), seed)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_start_changes_nothing(name):
    got = attached(name).eval()(ids()).logits
    torch.testing.assert_close(got, real(llama())(ids()).logits, rtol=2e-5, atol=2e-6)
