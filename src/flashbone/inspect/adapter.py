"""What an adapter's file holds: sizes, values, and which engines could serve it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flashbone.conversion import engines
from flashbone.files import names, rwkv
from flashbone.inspect.contents import AdapterContents, read_contents
from flashbone.inspect.reports import AdapterReport, BlockGroup, EngineVerdict, TensorGroup
from flashbone.inspect.writing import group_names
from flashbone.variants.base import RotatingVariant

Rotation = tuple[float, float]  # error of orthogonality, angle in degrees


def inspect_adapter(path: str | Path, progress: Callable[[int, int], None] | None = None) -> AdapterReport:
    """Read an adapter and describe it. No code in a pickle is run.

    Args:
        path: A folder of PEFT (BONE, MISS or LORA), or a file of RWKV-PEFT.
        progress: Called with the number of modules whose rotation is known, and of all modules.

    Raises:
        FormatError: it is missing, broken, or of no known layout.
    """
    contents = read_contents(Path(path))
    tensors = {f"{module}{ending}": t for module, parts in contents.blocks.items() for ending, t in parts.items()}
    tensors |= contents.others
    bad = {name: n for name, tensor in tensors.items() if (n := _count_not_finite(tensor))}
    return AdapterReport(
        adapter=str(path),
        layout=contents.layout,
        method=contents.method,
        variant=contents.variant.name if contents.variant else None,
        evidence=contents.evidence,
        base_model=contents.base_model,
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())),
        tensors=len(tensors),
        bytes=sum(t.nbytes for t in tensors.values()),
        file_bytes=contents.file.stat().st_size,
        not_finite=sum(bad.values()),
        not_finite_in=tuple(bad),
        untrained=sum(_is_untrained(parts) for parts in contents.blocks.values()),
        blocks=tuple(_block_groups(contents, _rotations(contents, bad, progress))),
        others=tuple(_tensor_groups(contents.others)),
        engines=_engine_verdicts(contents),
    )


def _count_not_finite(tensor: Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # fp8 has no operators
    return int(wide.numel() - torch.isfinite(wide).sum())


def _is_untrained(parts: Mapping[str, Tensor]) -> bool:
    """Whether the module adds nothing, as far as its tensors tell: LoRA starts with a zero B, the others whole."""
    return any(not tensor.float().any() for ending, tensor in parts.items() if not ending.endswith(("_A.weight", "_A")))


def _rotations(
    contents: AdapterContents, bad: Collection[str], progress: Callable[[int, int], None] | None
) -> dict[str, Rotation]:
    if not isinstance(contents.variant, RotatingVariant):
        return {}
    rotations = {}
    for n, (module, parts) in enumerate(contents.blocks.items(), 1):
        ((ending, block),) = parts.items()
        if f"{module}{ending}" not in bad:
            rotations[module] = contents.variant.orthogonality_error(block), contents.variant.angle_deg(block)
        if progress:
            progress(n, len(contents.blocks))
    return rotations


def _block_groups(contents: AdapterContents, rotations: Mapping[str, Rotation]) -> list[BlockGroup]:
    def key(module: str) -> Hashable:
        parts = sorted(contents.blocks[module].items())
        return contents.sizes[module], tuple((ending, tuple(t.shape), t.dtype) for ending, t in parts)

    groups = []
    for group in group_names((module, key(module)) for module in contents.blocks):
        tensors = [t for name in group.names for t in contents.blocks[name].values()]
        known = [rotations[name] for name in group.names if name in rotations]
        groups.append(
            BlockGroup(
                modules=group.pattern,
                count=len(group.names),
                r=contents.sizes[group.names[0]],
                shapes=tuple(tuple(t.shape) for t in contents.blocks[group.names[0]].values()),
                parameters=sum(t.numel() for t in tensors),
                bytes=sum(t.nbytes for t in tensors),
                orthogonality_error=max((error for error, _ in known), default=None),
                rotation_deg=max((angle for _, angle in known), default=None),
            )
        )
    return groups


def _tensor_groups(tensors: Mapping[str, Tensor]) -> list[TensorGroup]:
    groups = []
    for group in group_names((name, (tuple(t.shape), t.dtype)) for name, t in tensors.items()):
        first, n = tensors[group.names[0]], len(group.names)
        groups.append(TensorGroup(group.pattern, n, tuple(first.shape), n * first.numel(), n * first.nbytes))
    return groups


def _engine_verdicts(contents: AdapterContents) -> tuple[EngineVerdict, ...]:
    """A verdict for each engine; none where names are those of RWKV's own checkpoints, which no engine knows."""
    if rwkv.are_names(contents.blocks):
        return ()
    return tuple(EngineVerdict(engine.title, *_judge(engine, contents)) for engine in engines.ENGINES.values())


def _judge(engine: engines.ServingEngine, contents: AdapterContents) -> tuple[str, str]:
    if contents.others:
        tensors = f"{len(contents.others)} tensors besides the blocks"
        return "no", f"it holds {tensors}, which a plain LoRA has no place for; merge it"
    if contents.not_plain:
        return "no", f"{contents.not_plain}; merge it"
    if unknown := engine.not_adapted(contents.blocks):
        return "no", f"it does not adapt {unknown[0]}; merge it"
    is_gguf = "gguf" in engine.formats
    limits = f", as GGUF{engine.until}" if is_gguf else ""
    if not is_gguf and any(name.rpartition(".")[2] in names.CONV1D_LAYERS for name in contents.blocks):
        limits = ", unless the base keeps these layers as (in, out), as GPT-2 does"
    if contents.variant and not contents.variant.is_low_rank:
        return "approximate", f"once converted to LoRA by a truncated SVD{limits}; exact only merged"
    ranks = sorted(set(contents.sizes.values()))
    rank = engine.rank(ranks[-1])
    if rank is None:
        return "no", f"rank {ranks[-1]} is more than its {engine.ranks[-1]}; merge it"
    if contents.method == "LORA":
        how = "once converted" if is_gguf else "as it is"
        how += f", max_lora_rank {rank}" if engine.name == "vllm" else ""
    else:
        how = f"once converted to LoRA, of rank {rank}" + (", padded with zeros" if ranks != [rank] else "")
    return "exact", how + limits
