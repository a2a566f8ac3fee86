"""Merge adapters into a checkpoint on disk, one tensor in memory at a time.

`plan` decides what becomes of each tensor, `layout` which files the result has, `write` streams them, `record` is
merge.json. Everything is checked before anything is written, and the result equals a live merge bit for bit.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flashbone.errors import ConfigError, FlashboneError
from flashbone.files import outputs
from flashbone.files.base import BaseModel, open_base
from flashbone.files.beside import beside, tokenizer_folder
from flashbone.merge.head import with_heads
from flashbone.merge.layout import dtype_name, plan_layout, shard_bytes
from flashbone.merge.plan import WeightedAdapter, plan_edits, read_adapters
from flashbone.merge.record import make_record
from flashbone.merge.write import write_result


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the new folder, or file.
        variant: of each adapter, with " + " between them.
        merged: tensors that blocks were merged into.
        untrained: those of them whose blocks are all zero, so that they are as in the base.
        replaced: tensors that an adapter holds whole (biases, modules to save).
        copied: tensors that are those of the base, if in another dtype.
        bytes_written: all files together.
        seconds: wall-clock time.
        beside: where tokenizer, chat template and generation settings are from, where not from the base.
        record: the content of merge.json; a `.pth` file has none, and this is what it would hold.
    """

    out: Path
    variant: str
    merged: int
    untrained: int
    replaced: int
    copied: int
    bytes_written: int
    seconds: float
    beside: str
    record: dict[str, Any] = field(repr=False)


def merge_checkpoint(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype | None = None,
    shard_size: str | int | None = None,
    check: Callable[[Path], None] | None = None,
) -> MergeReport:
    """Write `out`: the base model's checkpoint with adapters merged into its weights, and merge.json.

    Args:
        base: Folder with model.safetensors, or with shards and their index; config, tokenizer and the like come along,
            but for those that an adapter's folder has.
            Or an RWKV model's `.pth` file; `out` is then one, too, without a merge.json, and what an adapter's folder
            has lies beside it, in `NAME.tokenizer`.
        adapters: One or more adapters of the family: PEFT folders, or files of RWKV-PEFT. Their order never matters.
        out: A new or empty folder; it appears whole at the end, or not at all.
        progress: Called with the bytes written so far and those to write.
        weights: The factor of each adapter's change; None: 1.
        dtype: Of all floating tensors of the result (bf16, fp16 or fp32); merged ones are rounded once. None keeps the
            base's.
        shard_size: Largest shard, such as "5GB". None keeps the base's shards.
        check: Called with the finished, still hidden result; if it raises, nothing is left behind.

    Raises:
        FormatError: base or adapter is broken, or they do not belong together; every bad name is listed.
        ShapeError: blocks do not fit their layers; all of them are listed.
        ConfigError: invalid arguments.
        NonFiniteError: a tensor would hold NaN or infinity.
        FlashboneError: `out` exists, or the disk is full.
    """
    start = time.perf_counter()
    base, out = Path(base), Path(out)
    dtype, largest = dtype_name(dtype), shard_bytes(shard_size)
    plain = open_base(base)
    weighted = read_adapters([adapters] if isinstance(adapters, (str, Path)) else adapters, weights)
    if plain.is_pth and largest is not None:
        raise ConfigError(f"shard size: {base} is one file, and so is the result; omit the shard size")
    if plain.is_pth and out.suffix != ".pth":
        raise FlashboneError(f"{out}: {base} is one file, and so is the result; name it {out}.pth")
    with with_heads(plain, weighted) as model:
        if model is not plain and largest is None:  # one file stays one
            largest = max(file.size for file in plain.files) + model.files[-1].size
        parts = _merge(base, model, len(plain.files), weighted, out, progress, dtype, largest, check)
    return dataclasses.replace(parts, seconds=time.perf_counter() - start)


def _merge(
    base: Path,
    model: BaseModel,
    files: int,
    weighted: list[WeightedAdapter],
    out: Path,
    progress: Callable[[int, int], None] | None,
    dtype: str | None,
    largest: int | None,
    check: Callable[[Path], None] | None,
) -> MergeReport:
    """Merge into a base that has all that the adapters name; its first `files` files are on disk."""
    edits = plan_edits(model, weighted)
    brought = beside([path for _, path, _ in weighted])
    grown = {name: tuple(e.value[0].shape) for name, e in edits.items() if e.value is not None}
    grown = {name: shape for name, shape in grown.items() if shape != model.entries[name].shape}
    layout = plan_layout(model, dtype, largest, brought, grown)
    changes = {
        name: edits[name].change if name in edits else "converted"
        for name, entry in model.entries.items()
        if name in edits or layout.dtypes[name] != entry.dtype
    }
    record = make_record(dataclasses.replace(model, files=model.files[:files]), weighted, brought, dtype, changes)
    if model.is_pth and brought.files:
        outputs.check(tokenizer_folder(out), 0, base)
    written = write_result(out, model, edits, layout, record, check, progress)
    if model.is_pth and brought.files:
        with outputs.whole_or_absent(tokenizer_folder(out)) as folder:
            brought.copy_to(folder)
    merged = [edit for edit in edits.values() if edit.terms]
    return MergeReport(
        out=out,
        variant=" + ".join(adapter.variant.name for adapter, _, _ in weighted),
        merged=len(merged),
        untrained=sum(
            edit.value is None and not any(block.float().any() for _, block, _ in edit.terms) for edit in merged
        ),
        replaced=len(edits) - len(merged),
        copied=len(model.entries) - len(edits),
        bytes_written=written,
        seconds=0.0,
        beside=brought.words,
        record=dataclasses.asdict(record),
    )
