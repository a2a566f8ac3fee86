"""What an adapter's file holds: sizes, values, and who could serve it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flashbone.inspect.engines import engines
from flashbone.inspect.held import Held, read_held
from flashbone.inspect.reports import AdapterReport, BlockGroup, TensorGroup
from flashbone.inspect.writing import group_names
from flashbone.variants.orthogonal import Orthogonal

Rotation = tuple[float, float]  # error of orthogonality, angle in degrees


def inspect_adapter(path: str | Path, progress: Callable[[int, int], None] | None = None) -> AdapterReport:
    """Read an adapter and describe it. Pickles are loaded without running any code of theirs.

    Args:
        path: A folder of PEFT (BONE, MISS or LORA), or a file of RWKV-PEFT.
        progress: Called with the modules whose rotation is known and their number.

    Raises:
        FormatError: it is missing, broken, or of no known layout.
    """
    held = read_held(Path(path))
    tensors = {f"{module}{suffix}": t for module, parts in held.blocks.items() for suffix, t in parts.items()}
    tensors |= held.others
    bad = {name: n for name, tensor in tensors.items() if (n := _count_not_finite(tensor))}
    return AdapterReport(
        adapter=str(path),
        layout=held.layout,
        method=held.method,
        variant=held.variant,
        evidence=held.evidence,
        base_model=held.base_model,
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())),
        tensors=len(tensors),
        bytes=sum(t.nbytes for t in tensors.values()),
        file_bytes=held.file.stat().st_size,
        not_finite=sum(bad.values()),
        not_finite_in=tuple(bad),
        untrained=sum(_is_untrained(parts) for parts in held.blocks.values()),
        blocks=tuple(_block_groups(held, _rotations(held, bad, progress))),
        others=tuple(_tensor_groups(held.others)),
        engines=engines(held),
    )


def _count_not_finite(tensor: Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # fp8 has no operators
    return int(wide.numel() - torch.isfinite(wide).sum())


def _is_untrained(parts: Mapping[str, Tensor]) -> bool:
    """Whether the module's delta is zero as far as its tensors tell: LoRA starts with a zero B, the others whole."""
    return any(not tensor.float().any() for suffix, tensor in parts.items() if not suffix.endswith(("_A.weight", "_A")))


def _rotations(held: Held, bad: Mapping[str, int], progress: Callable[[int, int], None] | None) -> dict[str, Rotation]:
    variant = held.bone
    if not isinstance(variant, Orthogonal):
        return {}
    found = {}
    for n, (module, parts) in enumerate(held.blocks.items(), 1):
        ((suffix, block),) = parts.items()
        if f"{module}{suffix}" not in bad:
            found[module] = variant.orthogonality_error(block), variant.angle_deg(block)
        if progress:
            progress(n, len(held.blocks))
    return found


def _block_groups(held: Held, rotations: Mapping[str, Rotation]) -> list[BlockGroup]:
    def key(module: str) -> tuple:
        return held.sizes[module], tuple((s, tuple(t.shape), t.dtype) for s, t in sorted(held.blocks[module].items()))

    groups = []
    for group in group_names((module, key(module)) for module in held.blocks):
        tensors = [t for name in group.names for t in held.blocks[name].values()]
        turned = [rotations[name] for name in group.names if name in rotations]
        groups.append(
            BlockGroup(
                modules=group.pattern,
                count=len(group.names),
                r=held.sizes[group.names[0]],
                shapes=tuple(tuple(t.shape) for t in held.blocks[group.names[0]].values()),
                parameters=sum(t.numel() for t in tensors),
                bytes=sum(t.nbytes for t in tensors),
                orthogonality_error=max((error for error, _ in turned), default=None),
                rotation_deg=max((angle for _, angle in turned), default=None),
            )
        )
    return groups


def _tensor_groups(tensors: Mapping[str, Tensor]) -> list[TensorGroup]:
    groups = []
    for group in group_names((name, (tuple(t.shape), t.dtype)) for name, t in tensors.items()):
        members = [tensors[name] for name in group.names]
        size = sum(t.numel() for t in members), sum(t.nbytes for t in members)
        groups.append(TensorGroup(group.pattern, len(members), tuple(members[0].shape), *size))
    return groups
