"""Which serving engines could take an adapter as a plain LoRA, once it is converted to one."""

from __future__ import annotations

from flashbone import variants
from flashbone.checkpoint import peft
from flashbone.report.inspect.data import Engine
from flashbone.report.inspect.held import Held

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its max_lora_rank may be
ENGINES = ("vLLM", "llama.cpp", "Ollama", "SGLang", "TGI")
BASES = {"Ollama": "of Llama and Gemma 2 models only"}
IS_LORA = ("bone", "mini")  # exactly, of rank r


def engines(held: Held) -> tuple[Engine, ...]:
    """A verdict for each engine; none for RWKV's own layout, whose names no engine knows."""
    if held.layout.startswith("RWKV"):
        return ()
    return tuple(_judge(name, held) for name in ENGINES)


def _judge(engine: str, held: Held) -> Engine:
    if held.others:
        kinds = "tensors besides the blocks, which a plain LoRA has no place for"
        return Engine(engine, "no", f"it holds {len(held.others)} {kinds}; merge it")
    if held.bone and any(
        suffix == peft.BLOCK_OF_TRANSPOSED or block.ndim > variants.dimensions(held.bone)
        for parts in held.blocks.values()
        for suffix, block in parts.items()
    ):
        return Engine(engine, "no", "it adapts embeddings or experts, not only linear layers; merge it")
    if held.is_dora:
        return Engine(engine, "no", "it is a DoRA, not a plain LoRA; merge it")
    limits = f", {BASES[engine]}" if engine in BASES else ""
    if held.method != "LORA" and held.variant not in IS_LORA:
        how = f"once converted to LoRA by a truncated SVD{limits}; exact only merged"
        return Engine(engine, "approximate", how)
    ranks = sorted(set(held.sizes.values()))
    how = "as it is" if held.method == "LORA" else "once converted to LoRA"
    if engine == "vLLM":
        padded = next((rank for rank in VLLM_RANKS if rank >= ranks[-1]), None)
        if padded is None:
            return Engine(engine, "no", f"rank {ranks[-1]} is more than its {VLLM_RANKS[-1]}; merge it")
        how += f", max_lora_rank {padded}" if held.method == "LORA" else f", of rank {padded}"
        how += ", padded with zeros" if held.method != "LORA" and ranks != [padded] else ""
    elif held.method != "LORA":
        how += f", of rank {ranks[-1]}" + (", smaller blocks padded with zeros" if len(ranks) > 1 else "")
    return Engine(engine, "exact", how + limits)
