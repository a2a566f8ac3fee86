"""Merge an adapter into a checkpoint on disk, one tensor in memory at a time.

Every tensor keeps its name, dtype and shape; the arithmetic is that of `flashbone.variants.merged_weight`, so that the
result equals the live model's merge bit for bit. Everything is checked before anything is written.
"""

import math
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
from flashbone.errors import FormatError, NonFiniteError, ShapeError
from flashbone.variants.stacked import PerExpert

_IN_PYTHON = (
    "merge in Python instead, on the model class that it was trained on:"
    " PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(OUT)"
)


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


@dataclass(frozen=True)
class Edit:
    """What becomes of one tensor: first replaced, then merged; `transposed` says that it is kept as (in, out),
    `stacked` that it is one matrix for each expert. Any other tensor of more than two axes is a convolution's."""

    tensor: str
    block: Tensor | None = None
    replacement: Tensor | None = None
    transposed: bool = False
    stacked: bool = False

    def apply(self, variant: variants.Variant, stored: Tensor) -> Tensor:
        """The new value, in the dtype and shape of the stored one.

        Raises:
            NonFiniteError: it would hold NaN or infinity.
        """
        value = stored if self.replacement is None else self.replacement.to(stored.dtype)
        if self.block is not None:
            W = value if self.stacked else value.flatten(1)
            W = W.mT if self.transposed else W
            variant = PerExpert(variant, len(value)) if self.stacked else variant
            W = variants.merged_weight(W, [(variant, self.block, 1.0)], self.tensor, must_be_finite=True)
            return (W.mT if self.transposed else W).reshape(value.shape)
        if not torch.isfinite(value).all():
            raise NonFiniteError(f"{self.tensor}: the adapter's value for it holds NaN or infinity; it is broken")
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
        _write(model, folder, {e.tensor: lambda W, e=e: e.apply(variant, W) for e in edits}, advance)
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


def plan(model: BaseModel, adapter: Adapter) -> list[Edit]:
    """Decide for every tensor that changes what becomes of it; nothing but headers is read.

    Raises:
        FormatError: names of the adapter that the base has not, or not clearly; all are listed.
        ShapeError: sizes that do not fit; all are listed.
    """
    replacements, problems = _without_tied_copies(model, adapter)
    blocks = {adapter.parameter(name): block for name, block in adapter.blocks.items()}
    known_transposed = {adapter.parameter(name) for name in adapter.transposed}
    found, lost = names.locate([*blocks, *(p for p in replacements if p not in blocks)], model.entries)
    problems += [_lost(name, reason, name in blocks, name in adapter.parameters) for name, reason in lost.items()]
    problems += _shared_targets(found)
    edits, misfits = [], []
    for parameter, tensor in found.items():
        block = blocks.get(parameter)
        is_parameter = parameter in adapter.parameters
        transposed = parameter in known_transposed
        if block is not None and not transposed and not is_parameter:
            transposed = names.is_transposed(tensor, model.config)
        if transposed is None:
            problems.append(f"{tensor}: the model_type says whether it is stored transposed, but config.json lacks it")
        stacked = is_parameter and len(model.entries[tensor].shape) == 3
        edit = Edit(tensor, block, replacements.get(parameter), bool(transposed), stacked)
        misfits += _misfits(edit, model.entries[tensor], adapter.variant)
        edits.append(edit)
    if problems:
        raise FormatError(f"the adapter does not fit {model.folder}: {'; '.join(problems + misfits)}")
    if misfits:
        raise ShapeError(f"the adapter does not fit {model.folder}: {'; '.join(misfits)}")
    return edits


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
            f" would change both; {_IN_PYTHON}, with tie_word_embeddings=False"
        )
        replacements.pop(name, None)
    return replacements, problems


def _lost(name: str, reason: str, is_block: bool, is_parameter: bool) -> str:
    tied = names.is_embedding(name, (*names.OUTPUT_EMBEDDINGS, *names.INPUT_EMBEDDINGS))
    hint = " (is it tied to another tensor?)" if tied else ""
    if is_parameter:
        return f"{name}: {reason}, which may keep every expert by itself (transformers fuses them); {_IN_PYTHON}"
    if is_block:
        return f"{name}: {reason}{hint}; is it an adapter of another model?"
    return f"{name}: {reason}{hint}, but the adapter holds a value for it; {_IN_PYTHON}"


def _shared_targets(found: dict[str, str]) -> list[str]:
    users: dict[str, list[str]] = {}
    for parameter, tensor in found.items():
        users.setdefault(tensor, []).append(parameter)
    return [f"{tensor}: is meant by both {' and '.join(who)}" for tensor, who in users.items() if len(who) > 1]


def _misfits(edit: Edit, entry: tensors.Entry, variant: variants.Variant) -> list[str]:
    where, shape = edit.tensor, entry.shape
    if entry.dtype not in tensors.FLOATS:
        wanted = ", ".join(tensors.FLOATS)
        return [f"{where}: is stored as {entry.dtype}, wanted {wanted}; merge into the original unquantised model"]
    found = []
    if edit.replacement is not None and tuple(edit.replacement.shape) != shape:
        got = tuple(edit.replacement.shape)
        found.append(f"{where}: the adapter's value has shape {got}, the base's {shape}; was it resized? {_IN_PYTHON}")
    matrix = shape[1:] if edit.stacked else (*shape[:1], math.prod(shape[1:]))
    if edit.block is not None and (len(shape) < 2 or (edit.transposed and not edit.stacked and len(shape) != 2)):
        found.append(f"{where}: shape {shape} is not that of a layer that can be adapted")
    elif edit.block is not None:
        out_features, in_features = reversed(matrix) if edit.transposed else matrix
        variant = PerExpert(variant, shape[0]) if edit.stacked else variant
        try:
            variants.check_block(where, variant, edit.block, out_features, in_features)
        except ShapeError as error:
            found.append(str(error))
    return found
