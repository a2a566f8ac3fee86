"""Logits of llama.cpp, with a LoRA or without, and the LoRAs that PEFT wrote."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashbone.files.lora import Lora


def logits(base: Path, tokens: list[int], adapter: Path | None = None) -> Tensor:
    """Those after each token, in fp64; keys and values are kept in fp32."""
    import llama_cpp

    fp32, context = llama_cpp.GGML_TYPE_F32, 64
    model = llama_cpp.Llama(
        str(base),
        lora_path=str(adapter) if adapter else None,
        n_ctx=context,
        n_batch=context,
        n_threads=1,
        logits_all=True,
        type_k=fp32,
        type_v=fp32,
        verbose=False,
    )
    try:
        model.eval(tokens)
        return torch.tensor(model.scores[: len(tokens)], dtype=torch.float64)
    finally:
        model.close()


def read_peft(folder: Path, base: Path) -> Lora:
    """A LoRA of PEFT whose alpha is its rank, without flashbone's reader."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        name, _, which = key.removeprefix("base_model.model.").partition(".lora_")
        factors.setdefault(name, {})[which[0]] = value
    pairs = {name: (pair["A"], pair["B"]) for name, pair in factors.items()}
    return Lora(pairs, base_model="someone/tiny", base_config=json.loads((base / "config.json").read_text()))


def merge_(model: torch.nn.Module, lora: Lora) -> None:
    """Add the LoRA to the weights of a model."""
    with torch.no_grad():
        for name, (A, B) in lora.factors.items():
            module = model.get_submodule(name)
            delta = B.double() @ A.double()
            module.weight += delta.mT if type(module).__name__ == "Conv1D" else delta
