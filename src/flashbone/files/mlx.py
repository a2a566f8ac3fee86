"""LoRAs for mlx-lm, on Apple silicon (and mlx on other CPUs).

adapter_config.json     fine_tune_type "lora", num_layers, lora_parameters {rank, scale, dropout, keys}
adapters.safetensors:
    <module>.lora_a     (in, rank)
    <module>.lora_b     (rank, out)
where a key names a module inside a layer (self_attn.q_proj), or outside of all layers in full (lm_head).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from flashbone.errors import FormatError
from flashbone.files import cards, folders
from flashbone.files.formats import AdapterCard, AdapterFormat
from flashbone.files.lora import Lora
from flashbone.files.states import write_safetensors

_ADAPTERS = "adapters.safetensors"
_LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.\d+\.")
_ALL = -1  # layers


def check(lora: Lora) -> None:
    """Check that mlx-lm has a place for a LoRA.

    Raises:
        FormatError: it has none for some of it; all is named.
    """
    problems = {
        "tensors that replace the base's": list(lora.replacements),
        "embedding tables": sorted(lora.embeddings),
        "layers that keep their weight as (in, out)": sorted(lora.conv1d),
    }
    if reasons := [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]:
        raise FormatError(f"mlx: a LoRA of mlx-lm cannot hold {'; '.join(reasons)}; merge it into the base instead")


def write(lora: Lora, folder: Path) -> None:
    """Write mlx-lm's folder of a LoRA; alpha = rank, so its scale is 1.

    Raises:
        FormatError: mlx-lm has no place for some of it; nothing was written.
    """
    check(lora)
    state = {}
    for name, (A, B) in lora.factors.items():
        state |= {f"{name}.lora_a": A.mT, f"{name}.lora_b": B.mT}
    layers = lora.base_config.get("num_hidden_layers")
    config = {
        "fine_tune_type": "lora",
        "num_layers": layers if isinstance(layers, int) else _ALL,
        "lora_parameters": {
            "rank": lora.rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({_LAYER.sub("", name, count=1) for name in lora.factors}),
        },
        "model": lora.base_model,
    }
    write_safetensors(state, folder / _ADAPTERS)
    (folder / folders.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _usage(card: AdapterCard) -> str:
    command = f"mlx_lm.generate --model {cards.base_word(card)} --adapter-path ."
    return cards.part("Load", "With mlx-lm:", cards.shell(command))


FORMAT = AdapterFormat("mlx", Lora, None, write, _usage)
