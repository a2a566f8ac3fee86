"""Merge an adapter into a checkpoint on disk, one tensor in memory at a time.

Every tensor keeps its name, dtype and shape; the arithmetic is that of `flashbone.variants.merged_weight`, so that the
result equals the live model's merge bit for bit. Everything is checked before anything is written.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashbone import variants
from flashbone.checkpoint import Adapter, names, peft, same_values, staging, tensors
from flashbone.checkpoint.base import BaseModel, open_base
from flashbone.checkpoint.placing import IN_PYTHON, Place, place
from flashbone.errors import NonFiniteError
from flashbone.variants.stacked import PerExpert


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the new folder.
        variant: the adapter's variant.
        merged: tensors that a block was merged into.
        replaced: tensors that the adapter holds whole (biases, modules to save).
        copied: tensors that are those of the base.
        bytes_written: all files together.
        seconds: wall-clock time.
    """

    out: Path
    variant: str
    merged: int
    replaced: int
    copied: int
    bytes_written: int
    seconds: float


def apply(place: Place, variant: variants.Variant, stored: Tensor) -> Tensor:
    """The new value of a tensor, in the dtype and shape of the stored one.

    Raises:
        NonFiniteError: it would hold NaN or infinity.
    """
    value = stored if place.replacement is None else place.replacement.to(stored.dtype)
    if place.block is not None:
        W = value if place.stacked else value.flatten(1)
        W = W.mT if place.transposed else W
        variant = PerExpert(variant, len(value)) if place.stacked else variant
        W = variants.merged_weight(W, [(variant, place.block, 1.0)], place.tensor, must_be_finite=True)
        return (W.mT if place.transposed else W).reshape(value.shape)
    if not torch.isfinite(value).all():
        raise NonFiniteError(f"{place.tensor}: the adapter's value for it holds NaN or infinity; it is broken")
    return value


def merge_checkpoint(
    base: str | Path, adapter: str | Path, out: str | Path, progress: Callable[[int, int], None] | None = None
) -> MergeReport:
    """Write the folder `out`: the base model's checkpoint with the adapter merged into its weights.

    Args:
        base: Folder with model.safetensors, or with shards and their index; config, tokenizer and the like come along.
        adapter: PEFT folder of a BONE adapter.
        out: A new or empty folder; it appears whole at the end, or not at all.
        progress: Called with the bytes written so far and those to write.

    Raises:
        FormatError: base or adapter is broken, or they do not belong together; every bad name is listed.
        ShapeError: blocks do not fit their layers; all of them are listed.
        NonFiniteError: a merged tensor would hold NaN or infinity.
        FlashboneError: `out` exists, or the disk is full.
    """
    start = time.perf_counter()
    base, adapter, out = Path(base), Path(adapter), Path(out)
    model, delta = open_base(base), peft.read(adapter)
    edits = plan(model, delta)
    total = model.size
    staging.check(out, total, base)
    variant = delta.variant
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        if progress is not None:
            progress(written, total)

    with staging.whole_or_absent(out) as folder:
        _write(model, folder, {e.tensor: lambda W, e=e: apply(e, variant, W) for e in edits}, advance)
    merged = sum(e.block is not None for e in edits)
    return MergeReport(
        out=out,
        variant=variant.name,
        merged=merged,
        replaced=len(edits) - merged,
        copied=len(model.entries) - len(edits),
        bytes_written=written,
        seconds=time.perf_counter() - start,
    )


def _write(
    model: BaseModel, folder: Path, edits: dict[str, Callable[[Tensor], Tensor]], advance: Callable[[int], None]
) -> None:
    for path in model.companions:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(model.folder / path, folder / path)
        advance((folder / path).stat().st_size)
    for file in model.files:
        tensors.rewrite(file, folder / file.path.name, edits, advance)


def plan(model: BaseModel, adapter: Adapter) -> list[Place]:
    """Decide for every tensor that changes what becomes of it; nothing but headers is read.

    Raises:
        FormatError: names of the adapter that the base has not, or not clearly; all are listed.
        ShapeError: sizes that do not fit; all are listed.
    """
    replacements, problems = _without_tied_copies(model, adapter)
    return place(model, dataclasses.replace(adapter, replacements=replacements), problems)


def _without_tied_copies(model: BaseModel, adapter: Adapter) -> tuple[dict[str, Tensor], list[str]]:
    """The replacements that the checkpoint has room for, and what cannot be done to embeddings that are tied: the
    input and the output embedding are one tensor there, while the adapter makes them differ."""
    replacements, problems = dict(adapter.replacements), []
    if not names.has_tied_embeddings(model.config, model.entries):
        return replacements, problems
    heads = [p for p in replacements if names.is_embedding(p, names.OUTPUT_EMBEDDINGS)]
    inputs = [p for p in replacements if names.is_embedding(p, names.INPUT_EMBEDDINGS)]
    ends = (*names.OUTPUT_EMBEDDINGS, *names.INPUT_EMBEDDINGS)
    touched = [m for m in adapter.blocks if names.is_embedding(adapter.parameter(m), ends)]
    agree = len(heads) == len(inputs) == 1 and same_values(replacements[heads[0]], replacements[inputs[0]])
    if agree and not touched:
        if heads[0] not in model.entries:
            del replacements[heads[0]]
        return replacements, problems
    for name in dict.fromkeys([*touched, *heads, *inputs]):
        problems.append(
            f"{name}: the base ties its output embedding to the input embedding (tie_word_embeddings), so changing one"
            f" would change both; {IN_PYTHON}, with tie_word_embeddings=False"
        )
        replacements.pop(name, None)
    return replacements, problems
