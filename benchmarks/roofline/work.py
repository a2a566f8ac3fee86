"""Pieces of work on paper, with their kernels: one layer, one block of a model, a training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import MODELS, Setting
from benchmarks.errors import UsageError
from benchmarks.models import LINEARS, OneLayer
from benchmarks.on_paper import on_paper
from benchmarks.roofline.kernels import Kernel, KernelLog

ROW = 2048  # tokens of a row, at most


def config_of(model: str) -> Any:
    """A model's configuration: of a folder, or a shape of `MODELS`, by whatever owner it is named.

    Raises:
        UsageError: it is neither.
    """
    from transformers import AutoConfig, LlamaConfig

    if Path(model).exists():
        return AutoConfig.from_pretrained(model)
    name = model.rpartition("/")[2].lower()
    if name not in MODELS:
        raise UsageError(f"--model {model}: no folder with a config.json, and none of {', '.join(MODELS)}")
    return LlamaConfig(**MODELS[name])


def layer(setting: Setting, tokens: int, in_features: int, out_features: int, dtype: str) -> list[Kernel]:
    """Forward and backward of a linear layer, to the input and to the adapter."""
    base = OneLayer(in_features, out_features, getattr(torch, dtype), "meta")
    with on_paper(base, setting, ["linear"]) as model:
        x = torch.empty(tokens, in_features, dtype=getattr(torch, dtype), requires_grad=True)
        gradient = torch.empty(tokens, out_features, dtype=getattr(torch, dtype))
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        with KernelLog() as log:
            inner.linear(x).backward(gradient)
    return log.kernels


def step(config: Any, setting: Setting, tokens: int, dtype: str, autocast: bool, blocks: int) -> list[Kernel]:
    """A training step of the model with its first blocks alone: forward, backward, AdamW; the second one, when AdamW
    has its moments."""
    from transformers import AutoModelForCausalLM

    config.num_hidden_layers, config.use_cache = blocks, False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).requires_grad_(False)
    with on_paper(base, setting, LINEARS) as model:
        model.enable_input_require_grads()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, foreach=True) if parameters else None
        ids = torch.zeros(max(tokens // ROW, 1), min(tokens, ROW), dtype=torch.long)
        log = KernelLog()

        def one() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            if optimiser is not None:
                optimiser.step()
                optimiser.zero_grad()

        one()
        with log:
            one()
    return log.kernels
