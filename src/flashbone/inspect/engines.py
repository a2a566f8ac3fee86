"""Which serving engines could take an adapter as a plain LoRA, once it is converted to one."""

from __future__ import annotations

from flashbone import variants
from flashbone.conversion import engines as serving
from flashbone.files import names, peft, rwkv
from flashbone.inspect.held import Held
from flashbone.inspect.reports import EngineVerdict

CONV1D = tuple(f".{layer}" for layer in names.CONV1D_LAYERS)
IS_LORA = ("bone", "mini")  # exactly, of rank r


def engines(held: Held) -> tuple[EngineVerdict, ...]:
    """A verdict for each engine; none where names are those of RWKV's own checkpoints, which no engine knows."""
    if rwkv.are_names(held.blocks):
        return ()
    return tuple(_judge(engine, held) for engine in serving.ENGINES.values())


def _judge(engine: serving.Engine, held: Held) -> EngineVerdict:
    if held.others:
        kinds = "tensors besides the blocks, which a plain LoRA has no place for"
        return EngineVerdict(engine.title, "no", f"it holds {len(held.others)} {kinds}; merge it")
    if held.bone and any(
        suffix == peft.BLOCK_OF_TRANSPOSED or block.ndim > variants.dimensions(held.bone)
        for parts in held.blocks.values()
        for suffix, block in parts.items()
    ):
        return EngineVerdict(engine.title, "no", "it adapts embeddings or experts, not only linear layers; merge it")
    if held.is_dora:
        return EngineVerdict(engine.title, "no", "it is a DoRA, not a plain LoRA; merge it")
    if strange := engine.not_adapted(held.blocks):
        return EngineVerdict(engine.title, "no", f"it does not adapt {strange[0]}; merge it")
    limits = f", as GGUF{engine.until}" if "gguf" in engine.formats else ""
    if not limits and any(name.endswith(CONV1D) for name in held.blocks):
        limits = ", unless the base keeps these layers as (in, out), as GPT-2 does"
    if held.method != "LORA" and held.variant not in IS_LORA:
        how = f"once converted to LoRA by a truncated SVD{limits}; exact only merged"
        return EngineVerdict(engine.title, "approximate", how)
    return _exact(engine, held, limits)


def _exact(engine: serving.Engine, held: Held, limits: str) -> EngineVerdict:
    ranks = sorted(set(held.sizes.values()))
    taken = engine.rank(ranks[-1])
    if taken is None:
        return EngineVerdict(engine.title, "no", f"rank {ranks[-1]} is more than its {engine.ranks[-1]}; merge it")
    if held.method == "LORA":
        how = "once converted" if "gguf" in engine.formats else "as it is"
        how += f", max_lora_rank {taken}" if engine.name == "vllm" else ""
    else:
        how = f"once converted to LoRA, of rank {taken}" + (", padded with zeros" if ranks != [taken] else "")
    return EngineVerdict(engine.title, "exact", how + limits)
