"""The models that are measured, and twins of them that share one base in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cases import SMOLLM2

ATTENTION_OUTPUTS = ["attention.output.dense"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class OneLayer(nn.Module):
    """A single linear layer without bias, so that PEFT has something to look for it in."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=device)
        self.requires_grad_(False)


def load_model(name: str, dtype: str, device: str) -> Any:
    """A frozen causal language model: "smollm2" from its folder, "tiny" made on the spot (0.1M parameters)."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name == "tiny":
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=2, **sizes))
        model.to(getattr(torch, dtype))
    else:
        model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=getattr(torch, dtype))
    model.config.use_cache = False
    return model.to(device).requires_grad_(False)


def load_encoder(name: str, dtype: str, device: str) -> Any:
    """A frozen classifier on BERT with random weights: "bert-base" in its published shape, or "bert-tiny"."""
    from transformers import BertConfig, BertForSequenceClassification

    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(BertConfig(**(tiny if name == "bert-tiny" else {})))
    return model.to(device, getattr(torch, dtype)).eval().requires_grad_(False)


def model_folder(name: str, scratch: Path) -> Path:
    """Where the model's checkpoint lies; that of "tiny" is written into `scratch`."""
    if name != "tiny":
        return SMOLLM2
    folder = scratch / "tiny"
    if not folder.is_dir():
        load_model(name, "float32", "cpu").save_pretrained(folder)
    return folder


def twin(module: nn.Module) -> Any:
    """A copy of the module's structure over the same tensors: a dozen adapted models need one base in memory."""
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, shared)


def bare(model: Any) -> Any:
    """The model inside a PeftModel, with the adapters in its layers; any other module as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
