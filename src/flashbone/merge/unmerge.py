"""Take adapters out of a merged checkpoint: the base, as far as rounding left it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashbone.errors import FlashboneError, FormatError
from flashbone.files import reading
from flashbone.files.base import BaseModel, open_base
from flashbone.files.tensors import FLOATS, Entry
from flashbone.merge import record, source
from flashbone.merge.bound import Error, bound, measured, sizes
from flashbone.merge.plan import Edit, Weighted, checked_weights, plan
from flashbone.merge.write import CONFIG, Job, run
from flashbone.variants.merged import undo


@dataclass(frozen=True)
class UnmergeReport:
    """What came back.

    Attributes:
        out: the new folder, or file.
        computed: tensors that adapters were taken out of.
        converted: tensors that only got their dtype back.
        replaced: tensors that were copied from the base that was given.
        copied: tensors that are those of the merged model.
        proved: tensors whose sha256 is that of the original; of those that were computed or converted.
        is_proved: whether these are all of them, and the others those that went in: then the result is the base.
        max_abs_error: over the computed and converted tensors: the largest difference from the original; 0 if proved.
        relative_rms_error: RMS of the difference over RMS of the original.
        is_measured: whether the errors were measured (or are proved to be 0); else they are upper bounds.
        bytes_written: all files together.
        seconds: wall-clock time.
    """

    out: Path
    computed: int
    converted: int
    replaced: int
    copied: int
    proved: int
    is_proved: bool
    max_abs_error: float
    relative_rms_error: float
    is_measured: bool
    bytes_written: int
    seconds: float


def unmerge_checkpoint(
    merged: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
) -> UnmergeReport:
    """Write `out`: the model from which `merged` came, in its own dtypes.

    Its merge.json, if it has one, has the sha256 of every tensor of it and of the base: what was changed since, and a
    `base` that is another, are refused. Where it proves by sha256 that every tensor is the original again, the report
    says so; elsewhere it says by how much they differ, measured or at most.

    Args:
        merged: Folder, or `.pth` file, that holds the adapters.
        adapters: All that were merged.
        out: A new or empty folder (a file for a `.pth`); it appears whole at the end, or not at all.
        progress: Called with the bytes written so far and those to write.
        weights: With which they were merged. None: as merge.json says, else 1.
        base: The base, to measure the difference against; tensors that an adapter replaced are copied from it.

    Raises:
        FormatError: a file is broken, or they do not belong together: an adapter that did not go in, or not all.
        FlashboneError: a tensor cannot be computed back; all are named. Or `out` exists, or the disk is full.
    """
    start = time.perf_counter()
    paths = [Path(adapters)] if isinstance(adapters, (str, Path)) else [Path(a) for a in adapters]
    checked_weights(weights, len(paths))
    model = open_base(Path(merged))
    known = None if model.is_pth else record.read(model.folder)
    factors = _weights_of(known, paths, weights)
    given = [Weighted(reading.read_adapter(p), str(p), w) for p, w in zip(paths, factors, strict=True)]
    changed: Mapping[str, Any] = known["tensors"] if known else {}
    if known is not None:
        _check_record(model, known)
    edits = plan(model, given, _was_base_value(known))
    original = None if base is None else _original(Path(base), model)
    _check_undoable(model, edits, original)
    dtypes = {n: changed[n]["dtype"] if n in changed else e.dtype for n, e in model.entries.items()}
    if original is not None:
        dtypes = {name: entry.dtype for name, entry in original.entries.items()}
    taking = _Taking(edits, changed, original)
    touched = {*edits, *changed, *(record.unknown(known) if known else ())}
    names = [n for n in model.entries if n in touched or dtypes[n] != model.entries[n].dtype]
    if original is not None and known is not None:
        _check_base(original, known)
    elif original is not None:
        _check_untouched(model, original, [name for name in model.entries if name not in names])
    job = Job(
        model=model,
        out=Path(out),
        dtypes=dtypes,
        edits={name: taking.function(name) for name in names},
        texts=_texts(known),
        progress=progress,
    )
    proved = taking.proved
    last = None if known is None else _base_record(known, lambda: [n for n in names if n not in proved])
    written, _ = run(job, last)
    replaced = sum(edit.value is not None for edit in edits.values())
    is_proved = known is not None and len(proved) == len(names) - replaced
    return UnmergeReport(
        out=Path(out),
        computed=len(edits) - replaced,
        converted=len(names) - len(edits),
        replaced=replaced,
        copied=len(model.entries) - len(names),
        proved=len(proved),
        is_proved=is_proved,
        max_abs_error=taking.error.largest,
        relative_rms_error=taking.error.relative_rms,
        is_measured=original is not None or is_proved,
        bytes_written=written,
        seconds=time.perf_counter() - start,
    )


class _Taking:
    """Takes adapters out of one tensor after the other, and sums up how far the results can be from the originals."""

    def __init__(self, edits: Mapping[str, Edit], changed: Mapping[str, Any], original: BaseModel | None) -> None:
        self.edits, self.changed, self.original = edits, changed, original
        self.error, self.proved = Error(), set[str]()

    def function(self, name: str) -> Callable[[Tensor, torch.dtype], Tensor]:
        """What makes the original of this tensor."""
        return lambda stored, dtype: self._original_of(name, stored, dtype)

    def _original_of(self, name: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
        edit = self.edits.get(name, Edit(name))
        if edit.value is not None:
            assert self.original is not None
            return source.read_one(self.original, name)
        merged, merged_dtype = sizes(stored), stored.dtype
        result = stored if stored.dtype == dtype else torch.empty(stored.shape, dtype=dtype)
        if edit.terms:
            try:
                undo(edit.matrix(stored), edit.terms, edit.matrix(result), torch.float64)
            except RuntimeError as error:  # torch's LinAlgError
                raise FlashboneError(
                    f"{name}: the block by which it was multiplied is singular, so that nothing leads back from the"
                    " merged weight; only the base itself does"
                ) from error
        else:
            result.copy_(stored)
        del stored
        is_proved = name in self.changed and source.sha256_of(result) == self.changed[name]["sha256"]
        self.proved |= {name} if is_proved else set()
        if self.original is not None:
            self.error += measured(result, source.read_one(self.original, name))
        elif not is_proved:
            self.error += bound(merged, merged_dtype, edit.matrix(result) if edit.terms else result, edit.terms)
        else:
            self.error += Error(of_square=sizes(result).norm ** 2)
        return result


def _was_base_value(known: dict[str, Any] | None) -> Callable[[str, Tensor], bool]:
    """Whether a value that an adapter holds was the base's own, as the merge found out."""
    changed = known["tensors"] if known else None
    return lambda name, _: changed is not None and "replaced" not in changed.get(name, {"change": ""})["change"]


def _weights_of(known: dict[str, Any] | None, paths: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    """The weights with which these adapters were merged."""
    if known is None:
        return checked_weights(weights, len(paths))
    went_in = [(sorted(f["sha256"] for f in a["files"]), a["weight"], a["name"]) for a in known["adapters"]]
    found, strange = [], []
    for i, path in enumerate(paths):
        hashes = sorted(record.hashes(path))
        same = [entry for entry in went_in if entry[0] == hashes]
        exact = [entry for entry in same if weights is not None and entry[1] == weights[i]]
        if not same:
            strange.append(f"{path} did not go in (its hash is another)")
        elif weights is not None and not exact:
            strange.append(f"{path} went in with weight {same[0][1]}, not {weights[i]}")
        else:
            found.append((exact or same)[0])
            went_in.remove(found[-1])
    strange += [f"{name} went in and was not given" for _, _, name in went_in]
    if strange:
        raise FormatError(f"{record.NAME} of the merged model says otherwise: {'; '.join(strange)}")
    return [weight for _, weight, _ in found]


def _check_record(model: BaseModel, known: dict[str, Any]) -> None:
    """Check that the model is to the byte what the merge wrote."""
    changed, result = known["tensors"], known["result"]
    strange = [n for n in changed if n not in result or result[n]["dtype"] not in FLOATS]
    strange += [n for n in result if n not in model.entries]
    unknown = record.unknown(known)
    strange += [n for n in unknown if result[n]["dtype"] not in FLOATS]
    if strange:
        raise FormatError(f"{model.folder}: {record.NAME} is of another model, it has {', '.join(strange)}")
    wrong = [n for n, e in model.entries.items() if n not in result or not _is_like(e, result[n])]
    if not wrong:
        wrong = [n for n, found in source.hashes(model).items() if n not in unknown and found != result[n]["sha256"]]
    if wrong:
        raise FormatError(
            f"{model.folder}: changed since it was merged, as {record.NAME} says: {', '.join(wrong)}; unmerge the"
            " folder that the merge wrote"
        )


def _is_like(entry: Entry, wanted: Mapping[str, Any]) -> bool:
    return (entry.dtype, list(entry.shape)) == (wanted["dtype"], wanted["shape"])


def _check_base(base: BaseModel, known: dict[str, Any]) -> None:
    """Check that every tensor of the base that was given is the one that went in."""
    went_in = known["result"] | known["tensors"]
    found, unknown = source.hashes(base), record.unknown(known) - known["tensors"].keys()
    wrong = [n for n, e in base.entries.items() if e.dtype != went_in[n]["dtype"]]
    wrong += [n for n in base.entries if n not in unknown and found[n] != went_in[n]["sha256"] and n not in wrong]
    if wrong:
        raise FormatError(
            f"{base.folder} is not the base that went in, as {record.NAME} says, these differ: {', '.join(wrong)}"
        )


def _original(folder: Path, model: BaseModel) -> BaseModel:
    """The base that was given; it has the same tensors."""
    base = open_base(folder)
    shapes = [{n: e.shape for n, e in m.entries.items()} for m in (base, model)]
    wrong = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
    if wrong:
        raise FormatError(f"{folder} is not the base of {model.folder}, these differ: {', '.join(wrong)}")
    return base


def _check_untouched(model: BaseModel, original: BaseModel, names: Sequence[str]) -> None:
    wrong = [name for name in names if not source.same_bytes(model, original, name)]
    if wrong:
        raise FormatError(
            f"{original.folder} is not the base of {model.folder}: not by any adapter differ {', '.join(wrong)}"
        )


def _check_undoable(model: BaseModel, edits: Mapping[str, Edit], original: BaseModel | None) -> None:
    problems = []
    for name, edit in edits.items():
        if edit.value is not None and original is None:
            problems.append(f"{name} was replaced by the adapter's value; give --base, from which it is copied")
        elif sum(variant.delta_depends_on_weight for variant, _, _ in edit.terms) > 1:
            problems.append(f"two adapters on {name} depend on the base weight (bat-*, orthogonal); keep the base")
    if problems:
        raise FlashboneError(f"{model.folder}: not everything can be computed back: {'; '.join(problems)}")


def _texts(known: dict[str, Any] | None) -> dict[str, bytes]:
    """Files of the base that the merge had changed, but its merge.json."""
    texts = {}
    if known and known.get("base_config") is not None:
        texts[CONFIG] = known["base_config"].encode()
    return texts


def _base_record(
    known: dict[str, Any], unproved: Callable[[], Sequence[str]]
) -> tuple[str, Callable[[object], bytes], int] | None:
    """merge.json of a base that was merged itself, for `run` to write last: what did not come back is unknown to it."""
    base = known.get("base_record")
    if base is None:
        return None
    size = len(record.to_bytes(base))

    def content(_: object) -> bytes:
        record.forget(base, unproved())
        return record.to_bytes(base)

    return record.NAME, content, size
