"""What an adapter file holds, whichever of the known layouts it has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flashbone.errors import FormatError
from flashbone.files import miss, peft, rwkv
from flashbone.files.sources import read_json
from flashbone.files.states import read_state
from flashbone.variants import Variant

# What the other methods call their trained tensors, with the axis of each that is as long as r.
SUFFIXES = {
    "MISS": {miss.BLOCK: -2},
    "LORA": {".lora_A.weight": 0, ".lora_B.weight": 1, ".lora_embedding_A": 0, ".lora_embedding_B": 1},
}
# As transformers names a model's files.
_MODELS_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
DORA = ".lora_magnitude_vector"


@dataclass(frozen=True)
class Held:
    """The tensors of an adapter, sorted.

    Attributes:
        file: that holds them.
        layout, method, evidence, base_model: as in `AdapterReport`.
        variant: its name, None where the file does not say it.
        blocks: module -> suffix -> tensor.
        sizes: module -> block size or rank.
        others: name in the base -> tensor that takes its place.
        bone: the variant with its settings, of a BONE adapter.
    """

    file: Path
    layout: str
    method: str
    variant: str | None
    evidence: str
    base_model: str | None
    blocks: dict[str, dict[str, Tensor]]
    sizes: dict[str, int]
    others: dict[str, Tensor]
    bone: Variant | None = None
    is_dora: bool = False


def read_held(path: Path) -> Held:
    """Read an adapter: a folder of PEFT, or a file of RWKV-PEFT.

    Raises:
        FormatError: it is missing, broken, or of no known layout.
    """
    if path.is_file() and path.name in (peft.CONFIG, peft.SAFETENSORS, peft.PICKLE):
        path = path.parent
    if (path / "adapter.pth").is_file() and not (path / peft.CONFIG).exists():
        path = path / "adapter.pth"
    if path.is_file():
        if _MODELS_WEIGHTS.fullmatch(path.name) and (path.parent / "config.json").is_file():
            raise FormatError(f"{path}: holds a model's weights; for the model, give its folder, {path.parent}")
        return _read_rwkv(path)
    config = read_json(path / peft.CONFIG) if (path / peft.CONFIG).is_file() else {}
    method = config.get("peft_type")
    if isinstance(method, str) and method in SUFFIXES:
        return _read_other(path, method, config)
    return _read_bone(path)


def _read_bone(folder: Path) -> Held:
    adapter = peft.read(folder)
    named = adapter.config.get("variant")
    return Held(
        file=peft.weights_file(folder),
        layout="PEFT folder, as flashbone writes it" if named else "PEFT folder, as PEFT 0.14 to 0.18 wrote it",
        method="BONE",
        variant=adapter.variant.name,
        evidence=f"{peft.CONFIG}: "
        + (f"variant {named!r}" if named else f"no variant, {_init_weights(adapter.config)}"),
        base_model=adapter.base_model,
        blocks={
            module: {peft.BLOCK_OF_TRANSPOSED if module in adapter.transposed else peft.BLOCK: block}
            for module, block in adapter.blocks.items()
        },
        sizes={module: block.shape[-2] for module, block in adapter.blocks.items()},
        others=adapter.replacements,
        bone=adapter.variant,
    )


def _init_weights(config: dict[str, Any]) -> str:
    return f"init_weights {config.get('init_weights', True)!r}"


def _read_other(folder: Path, method: str, config: dict[str, Any]) -> Held:
    """MISS and LoRA: recognised and described, not checked."""
    file = peft.weights_file(folder)
    blocks: dict[str, dict[str, Tensor]] = {}
    others, sizes, is_dora = {}, {}, False
    for key, tensor in read_state(file).items():
        name = key.removeprefix(peft.ROOT)
        suffix = next((s for s in (*SUFFIXES[method], DORA) if name.endswith(s)), None)
        is_dora |= suffix == DORA
        if suffix is None or (suffix == DORA and method != "LORA"):
            others[name] = tensor
            continue
        module = name.removesuffix(suffix)
        blocks.setdefault(module, {})[suffix] = tensor
        if suffix in SUFFIXES[method] and tensor.ndim > 1:
            sizes[module] = tensor.shape[SUFFIXES[method][suffix]]
    lost = [module for module in blocks if module not in sizes]
    if not blocks or lost:
        what = f"{', '.join(lost)} have no matrix" if lost else "no tensor is one of that method"
        raise FormatError(f"{file}: {peft.CONFIG} says {method}, but {what}; is the file whole?")
    variant = miss.variant_name(config.get("init_weights", True)) if method == "MISS" else None
    evidence = f"{peft.CONFIG}: peft_type {method!r}" + (f", {_init_weights(config)}" if method == "MISS" else "")
    base = config.get("base_model_name_or_path") or None
    return Held(file, "PEFT folder", method, variant, evidence, base, blocks, sizes, others, is_dora=is_dora)


def _read_rwkv(file: Path) -> Held:
    adapter = rwkv.read(file)
    mixed = len(adapter.modes) > 1
    return Held(
        file=file,
        layout=f"RWKV-PEFT, keys end in .{adapter.suffix}",
        method="BONE",
        variant=_RWKV_VARIANTS.get((adapter.modes, adapter.suffix)),
        evidence="; ".join(_rwkv_evidence(m, adapter.suffix) for m in adapter.modes) + "; both in one file" * mixed,
        base_model=None,
        blocks={module: {f".{adapter.suffix}": block} for module, block in adapter.blocks.items()},
        sizes={m: b.shape[0] if b.ndim == 2 else b.shape[-1] for m, b in adapter.blocks.items()},
        others=adapter.replacements,
    )


_RWKV_VARIANTS: dict[tuple[tuple[str, ...], str], str] = {
    (("bone",), "bone"): "bone",
    (("bone",), "disha"): "bone",
    (("bat",), "disha"): "bat-row",
}


def _rwkv_evidence(mode: str, suffix: str) -> str:
    if mode == "bone":
        return "blocks of two axes (r, out): RWKV-PEFT's mode bone"
    if suffix == "disha":
        return "blocks of three axes (n, r, r) under .disha: RWKV-PEFT's mode bat, n = in / r"
    return (
        "blocks of three axes (n, r, r) under .bone: a bat, and the file does not say which. RWKV-PEFT's mode bat is"
        " bat-row, with n = in / r; its first versions wrote n = out / r. Where in = out the shapes are the same"
    )
