"""The models that are measured, and twins of them that share one base in memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from benchmarks.cases import MODELS

ATTENTION_OUTPUTS = ["attention.output.dense"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class OneLayer(nn.Module):
    """A single linear layer without bias, so that PEFT has something to look for it in."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=device)
        self.requires_grad_(False)


def load_model(name: str, dtype: str, device: str) -> Any:
    """A frozen Llama with random weights: of one of the shapes of `MODELS`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], use_cache=False)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.requires_grad_(False)


def quantize(model: Any) -> None:
    """Put bitsandbytes' nf4 weights in the place of those of a Llama's blocks."""
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, child in module.named_children():
            if name in LINEARS:
                weight = bnb.nn.Params4bit(child.weight.data.clone(), requires_grad=False, quant_type="nf4")
                dtype, device = child.weight.dtype, child.weight.device
                replaced = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                )
                replaced.weight = weight
                setattr(module, name, replaced.to(device))


def load_encoder(name: str, dtype: str, device: str) -> Any:
    """A frozen classifier on BERT with random weights: "bert-base" in its published shape, or "bert-tiny"."""
    from transformers import BertConfig, BertForSequenceClassification

    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(BertConfig(**(tiny if name == "bert-tiny" else {})))
    return model.to(device, getattr(torch, dtype)).eval().requires_grad_(False)


def twin(module: nn.Module) -> Any:
    """A copy of the module's structure over the same tensors: a dozen adapted models need one base in memory."""
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, shared)


def bare(model: Any) -> Any:
    """The model inside a PeftModel, with the adapters in its layers; any other module as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
