"""LoRAs in GGUF, for llama.cpp and what is built on it.

general.type "adapter", general.architecture, adapter.type "lora", adapter.lora.alpha = rank, and for each layer
    <tensor>.lora_a         (rank, in), F32
    <tensor>.lora_b         (out, rank), F32
where <tensor> is the name of the weight in a GGUF of the base, such as blk.0.attn_q.weight. F32 whatever the factors
are kept in: it holds them exactly, and ggml rounds the layer's input to the type of lora_a.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flashbone.errors import BackendError, FormatError
from flashbone.files import cards
from flashbone.files.formats import AdapterCard, AdapterFormat
from flashbone.files.lora import Lora

MERGE = "merge it into the base instead, and convert that with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp lays out a model whose linear layers it keeps apart.

    Attributes:
        name: general.architecture.
        paired: whether the rows of query and key are reordered for its rotary embedding.
        tied: whether the output layer is the embedding table where config.json does not say.
    """

    name: str
    paired: bool = False
    tied: bool = False


# The first of `architectures` in config.json. tests/llamacpp runs every one of them: other models may be missing only
# because they were not tried, or because llama.cpp fuses, splits or stacks their layers.
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", paired=True),
    "MistralForCausalLM": Architecture("llama", paired=True),
    "GraniteForCausalLM": Architecture("granite", paired=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", paired=True, tied=True),
    "OlmoForCausalLM": Architecture("olmo", paired=True),
    "ArceeForCausalLM": Architecture("arcee", paired=True),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "Olmo3ForCausalLM": Architecture("olmo2"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma", tied=True),
    "Gemma2ForCausalLM": Architecture("gemma2", tied=True),
    "Gemma3ForCausalLM": Architecture("gemma3", tied=True),
    "Gemma3ForConditionalGeneration": Architecture("gemma3", tied=True),
    "Ernie4_5ForCausalLM": Architecture("ernie4_5", tied=True),
    "HunYuanDenseV1ForCausalLM": Architecture("hunyuan-dense"),
    "PhiForCausalLM": Architecture("phi2"),
    "Phi3ForCausalLM": Architecture("phi3"),
    "StableLmForCausalLM": Architecture("stablelm"),
    "Starcoder2ForCausalLM": Architecture("starcoder2", tied=True),
    "CohereForCausalLM": Architecture("command-r", tied=True),
    "Cohere2ForCausalLM": Architecture("cohere2", tied=True),
    "SeedOssForCausalLM": Architecture("seed_oss"),
    "Exaone4ForCausalLM": Architecture("exaone4"),
    "Glm4ForCausalLM": Architecture("glm4"),
    "NemotronForCausalLM": Architecture("nemotron"),
    "ApertusForCausalLM": Architecture("apertus"),
    "GPT2LMHeadModel": Architecture("gpt2", tied=True),
}

_ROTATED = (".attn_q.weight", ".attn_k.weight")


def write(lora: Lora, file: Path) -> None:
    """Write a LoRA as one GGUF file.

    Raises:
        FormatError: GGUF has no place for some of it, or its base is missing or of an unknown architecture.
        BackendError: the `gguf` package is missing or too old.
    """
    names, architecture = tensor_names(lora), architecture_of(lora)
    gguf = _package()
    writer = gguf.GGUFWriter(file, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.rank))
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        if lora.base_model:
            base = Path(lora.base_model).name
            writer.add_name(f"LoRA of {base}")
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base)
        for name, (A, B) in lora.factors.items():
            tensor = names[name]
            if architecture.paired and tensor.endswith(_ROTATED):
                B = in_pairs(B, _heads(_text(lora.base_config), tensor))
            writer.add_tensor(f"{tensor}.lora_a", _values(A))
            writer.add_tensor(f"{tensor}.lora_b", _values(B))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def architecture_of(lora: Lora) -> Architecture:
    """How llama.cpp lays out the base.

    Raises:
        FormatError: the architecture is unknown, or the base's config.json is missing.
    """
    if not lora.base_config:
        raise FormatError("gguf: the names and sizes of its tensors follow the base; give the base model's folder")
    named = lora.base_config.get("architectures")
    if not isinstance(named, list) or not named:
        raise FormatError(
            "gguf: config.json of the base names no architectures; give the folder that transformers saved"
        )
    if not isinstance(named[0], str) or named[0] not in ARCHITECTURES:
        raise FormatError(
            f"gguf: the base is a {named[0]}, wanted one of {', '.join(ARCHITECTURES)}; {MERGE},"
            " or convert to lora and try llama.cpp's convert_lora_to_gguf.py on that"
        )
    return ARCHITECTURES[named[0]]


def tensor_names(lora: Lora) -> dict[str, str]:
    """Module name in the base -> name of its weight in a GGUF of the base.

    Raises:
        FormatError: GGUF has no place for some of the LoRA; all of it is named.
        BackendError: the `gguf` package is missing or too old.
    """
    architecture, config = architecture_of(lora), _text(lora.base_config)
    problems = {"tensors that replace the base's": list(lora.replacements), "embedding tables": sorted(lora.embeddings)}
    names: dict[str, str] = {}
    lookup = _lookup(architecture, config)
    for name in lora.factors:
        tensor = lookup(name)
        is_double = tensor in names.values()
        problem = "layers that are named twice" if is_double else _problem(lora, name, tensor, architecture, config)
        if problem and name not in lora.embeddings:
            problems.setdefault(problem, []).append(name)
        names[name] = tensor
    if reasons := [f"{what}: {', '.join(modules)}" for what, modules in problems.items() if modules]:
        raise FormatError(f"gguf: a LoRA in GGUF cannot hold {'; '.join(reasons)}; {MERGE}")
    return names


def _problem(lora: Lora, name: str, tensor: str, architecture: Architecture, config: dict[str, Any]) -> str | None:
    """What is wrong with a layer whose tensor has this name."""
    A, B = lora.factors[name]
    if not tensor.startswith("blk.") and tensor != "output.weight":
        return f"layers that have no place of their own in a GGUF of {architecture.name}"
    if tensor == "output.weight" and config.get("tie_word_embeddings", architecture.tied):
        return "layers that are tied to the embedding table"
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != lora.rank or B.shape[1] != lora.rank:
        return f"factors that are not of rank {lora.rank}"
    if architecture.paired and tensor.endswith(_ROTATED):
        heads = _heads(config, tensor)
        return None if heads and B.shape[0] % (2 * heads) == 0 else f"layers whose rows are no pairs of {heads} heads"
    return None


def in_pairs(B: Tensor, heads: int) -> Tensor:
    """The rows of query or key as llama.cpp rotates them: row i of a head beside its row i + head / 2."""
    return rearrange(B, "(head half row) rank -> (head row half) rank", head=heads, half=2)


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the language model, also where it is a part of one for images and text."""
    inner = config.get("text_config")
    return config | inner if isinstance(inner, dict) else config


def _heads(config: dict[str, Any], tensor: str) -> int:
    """Heads of the query or the key; 0 if the config does not give them."""
    heads = config.get("num_attention_heads")
    if tensor.endswith(".attn_k.weight"):
        heads = config.get("num_key_value_heads") or heads
    return heads if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 else 0


def _lookup(architecture: Architecture, config: dict[str, Any]) -> Callable[[str], str]:
    """From a module's name to its tensor in GGUF, or to itself where it has none."""
    gguf = _package()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture.name not in kinds:
        raise BackendError(f"gguf: this version does not know {architecture.name}; pip install --upgrade gguf")
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if not isinstance(layers, int):
        raise FormatError("gguf: config.json of the base does not give its number of layers")
    names = gguf.get_tensor_name_map(kinds[architecture.name], layers)

    def lookup(name: str) -> str:
        # A model without a head has names without the prefix of its body; one for images, too, has one prefix more.
        module = name.replace("language_model.", "")
        known = (names.get_name(f"{body}{module}.weight", (".weight",)) for body in ("", "model.", "transformer."))
        return next((tensor for tensor in known if tensor), name)

    return lookup


def _package():
    try:
        import gguf
    except ImportError as error:
        raise BackendError("gguf: the package that writes the format is missing; pip install gguf") from error
    return gguf


def _values(factor: Tensor):
    return factor.detach().to("cpu", torch.float32).contiguous().numpy()


def _usage(card: AdapterCard) -> str:
    return cards.part("Load", "With llama.cpp:", cards.shell("llama-cli -m BASE.gguf --lora adapter.gguf"))


FORMAT = AdapterFormat("gguf", Lora, None, write, _usage, suffix=".gguf")
