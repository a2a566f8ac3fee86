"""Merge adapters into a checkpoint on disk, one tensor in memory at a time.

The arithmetic is that of `flashbone.variants.merged_weight`, so that the result equals the live model's merge bit for
bit. Everything is checked before anything is written.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashbone.errors import ConfigError
from flashbone.files import reading
from flashbone.files.base import BaseModel, open_base
from flashbone.files.sources import read_json
from flashbone.merge import outputs, record, values
from flashbone.merge.plan import Weighted, checked_weights, plan
from flashbone.merge.source import read_one
from flashbone.merge.write import CONFIG, Job, run


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the new folder, or file.
        variant: of each adapter, with " + " between them.
        merged: tensors that blocks were merged into.
        replaced: tensors that an adapter holds whole (biases, modules to save).
        copied: tensors that are those of the base, if in another dtype.
        bytes_written: all files together.
        seconds: wall-clock time.
        record: what merge.json says; of a `.pth` file, which has none, what it would say.
    """

    out: Path
    variant: str
    merged: int
    replaced: int
    copied: int
    bytes_written: int
    seconds: float
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
        base: Folder with model.safetensors, or with shards and their index; config, tokenizer and the like come along.
            Or an RWKV model's `.pth` file; `out` is then one, too, without a merge.json.
        adapters: One or more adapters of the family: PEFT folders, or files of RWKV-PEFT. Their order never matters.
        out: A new or empty folder; it appears whole at the end, or not at all.
        progress: Called with the bytes written so far and those to write.
        weights: What each adapter's change is multiplied by; None: 1.
        dtype: Of all floating tensors of the result (bf16, fp16 or fp32); merged ones are rounded once. None: as they
            are stored in the base.
        shard_size: Largest shard, such as "5GB". None: the base's shards.
        check: Called with the finished, still hidden result; what it raises leaves nothing behind.

    Raises:
        FormatError: base or adapter is broken, or they do not belong together; every bad name is listed.
        ShapeError: blocks do not fit their layers; all of them are listed.
        ConfigError: arguments that nobody can mean.
        NonFiniteError: a tensor would hold NaN or infinity.
        FlashboneError: `out` exists, or the disk is full.
    """
    start = time.perf_counter()
    paths = [Path(adapters)] if isinstance(adapters, (str, Path)) else [Path(a) for a in adapters]
    factors = checked_weights(weights, len(paths))
    dtype, largest = outputs.dtype_name(dtype), outputs.shard_bytes(shard_size)
    model = open_base(Path(base))
    if model.is_pth and largest is not None:
        raise ConfigError(f"shard size: {base} is one file, and so is the result; leave it out")
    given = [Weighted(reading.read_adapter(p), str(p), w) for p, w in zip(paths, factors, strict=True)]
    edits = plan(model, given, partial(_is_base_value, model))
    dtypes = outputs.converted_dtypes(model, dtype)
    changes = {name: edits[name].change if name in edits else "converted" for name in dtypes}
    changes = {n: c for n, c in changes.items() if n in edits or dtypes[n] != model.entries[n].dtype}
    config = None if dtype is None else _config_in(model, dtype)
    kept = (model.folder / CONFIG).read_bytes() if config is not None else None
    draft = record.draft(model, list(zip(paths, given, strict=True)), dtype, changes, dtypes, kept)
    job = Job(
        model=model,
        out=Path(out),
        dtypes=dtypes,
        edits={n: partial(values.edited, edits[n]) if n in edits else partial(values.converted, n) for n in changes},
        shard_bytes=largest,
        texts={} if config is None else {CONFIG: config},
        dtype=dtype,
        is_hashed=True,
        check=check,
        progress=progress,
    )

    def recorded(read: Any) -> bytes:
        record.fill(draft, read.files, read.originals, read.results)
        return record.to_bytes(draft)

    written, read = run(job, (record.NAME, recorded, len(record.to_bytes(draft))))
    if model.is_pth:
        recorded(read)
    merged = sum(bool(edit.terms) for edit in edits.values())
    return MergeReport(
        out=Path(out),
        variant=" + ".join(one.adapter.variant.name for one in given),
        merged=merged,
        replaced=len(edits) - merged,
        copied=len(model.entries) - len(edits),
        bytes_written=written,
        seconds=time.perf_counter() - start,
        record=draft,
    )


def _is_base_value(model: BaseModel, tensor: str, value: Tensor) -> bool:
    stored = read_one(model, tensor)
    wide = torch.promote_types(stored.dtype, value.dtype)
    return stored.shape == value.shape and torch.equal(stored.to(wide), value.to(wide))


def _config_in(model: BaseModel, dtype: str) -> bytes | None:
    """config.json that names the dtype; None if nothing changes."""
    file = model.folder / CONFIG
    if model.is_pth or not file.is_file():
        return None
    config = read_json(file)
    changed = outputs.config_in(config, dtype)
    return None if changed == config else outputs.json_bytes(changed)
