"""Write a merged model: tensor by tensor, whole or not at all.

The arithmetic is that of `flashbone.variants.merged.merged_weight`, as in a live merge.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor

from flashbone.errors import FormatError, NonFiniteError
from flashbone.files import outputs, pth, tensors
from flashbone.files.base import BaseModel
from flashbone.merge import record
from flashbone.merge.layout import ResultLayout
from flashbone.merge.plan import TensorEdit
from flashbone.variants import merged

_READ = 1 << 20  # bytes read at once
_WRITTEN = 1 << 24  # bytes of a changed tensor written at once

Progress = Callable[[int, int], None]


def write_result(
    out: Path,
    model: BaseModel,
    edits: Mapping[str, TensorEdit],
    layout: ResultLayout,
    merge_record: record.MergeRecord,
    check: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the result; it appears whole, or not at all.

    Args:
        out: The new folder, or the `.pth` file if the base is one.
        model: The base.
        edits: The tensors that adapters change. All others are copied, or converted to their dtype in `layout`.
        layout: The files of the result.
        merge_record: Gets the hashes of the base's files; written last, but not beside a `.pth`.
        check: Called with the finished folder or file before it appears; may raise.
        progress: Called with the bytes written so far and those to write.

    Returns:
        The bytes written.

    Raises:
        FlashboneError: `out` exists, or the disk is full.
        FormatError: a file of the base ended early.
        NonFiniteError: a tensor would hold NaN or infinity.
    """
    total = layout.size + (0 if model.is_pth else len(merge_record.to_bytes()))
    outputs.check(out, total, model.folder, is_file=model.is_pth)
    count = _ByteCount(progress, total)
    with outputs.whole_or_absent(out, is_file=model.is_pth) as target, ExitStack() as stack:
        readers = {file.path.name: stack.enter_context(closing(HashingReader(file.path))) for file in model.files}
        sources = {entry.name: (readers[file.path.name], entry) for file in model.files for entry in file.entries}

        def content(name: str) -> Iterator[tensors.Piece]:
            reader, entry = sources[name]
            return _content(reader, entry, edits.get(name), layout.dtypes[name])

        if model.is_pth:
            pth.write(target, layout.weights[0].tensors, content, count, pth.tied(model.files[0]))
        else:
            for name, text in layout.beside.items():
                _write_beside(target / name, text, count)
            for file in layout.weights:
                tensors.write(target / file.name, file.tensors, content, count, given_header=file.header)
        hashes = {name: reader.sha256() for name, reader in readers.items()}
        merge_record.set_hashes(hashes | {str(path): _sha256(model.folder / path) for path in model.companions})
        if not model.is_pth:
            _write_beside(target / record.NAME, merge_record.to_bytes(), count)
        if check is not None:
            check(target)
    return count.done


def _write_beside(target: Path, content: bytes | Path, count: "_ByteCount") -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copy(content, target)  # a link's target as a file
    else:
        target.write_bytes(content)
    count(target.stat().st_size)


def _sha256(path: Path) -> str:
    with closing(HashingReader(path)) as reader:
        return reader.sha256()


def _content(
    reader: "HashingReader", entry: tensors.TensorEntry, edit: TensorEdit | None, dtype: str
) -> Iterator[tensors.Piece]:
    """The bytes of a tensor of the result."""
    if edit is None and dtype == entry.dtype:
        yield from reader.pieces(entry)
        return
    stored, wanted = reader.tensor(entry), tensors.FLOATS[dtype]
    result = converted(entry.name, stored, wanted) if edit is None else edited(edit, stored, wanted)
    del stored
    data = tensors.as_bytes(result)
    for start in range(0, len(data), _WRITTEN):
        yield data[start : start + _WRITTEN]


def edited(edit: TensorEdit, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The new value of a tensor, rounded once; `stored` may be overwritten.

    Raises:
        NonFiniteError: it would hold NaN or infinity.
    """
    if not edit.terms:
        return _replaced(edit, stored, dtype)
    if edit.value is not None:  # as in the live model: loaded in the base's dtype, then merged into
        stored = _replaced(edit, stored, stored.dtype)
    result = stored if stored.dtype == dtype else torch.empty(stored.shape, dtype=dtype)
    merged.merged_weight(edit.matrix(stored), edit.terms, edit.tensor, True, edit.matrix(result))
    return result


def converted(tensor: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype.

    Raises:
        NonFiniteError: a number is beyond its range.
    """
    result = torch.empty(stored.shape, dtype=dtype)
    for old, new in zip(_chunks(stored), _chunks(result), strict=True):
        new.copy_(old)
        if (new.isinf() & old.isfinite()).any():
            raise NonFiniteError(
                f"{tensor}: it holds {float(old.abs().max()):.3g}, but the largest number of {dtype} is"
                f" {torch.finfo(dtype).max:.3g}; use another dtype"
            )
    return result


def _replaced(edit: TensorEdit, stored: Tensor, dtype: torch.dtype) -> Tensor:
    assert edit.value is not None
    value, weight = edit.value
    if not all(chunk.isfinite().all() for chunk in _chunks(value)):
        raise NonFiniteError(f"{edit.tensor}: the adapter's value for it holds NaN or infinity; the adapter is broken")
    if weight == 1:
        return converted(edit.tensor, value, dtype)
    wide = torch.promote_types(torch.promote_types(stored.dtype, value.dtype), torch.float32)
    result = stored if stored.dtype == dtype else torch.empty(stored.shape, dtype=dtype)
    for base, goal, new in zip(_chunks(stored), _chunks(value), _chunks(result), strict=True):
        new.copy_(base.to(wide) + weight * (goal.to(wide) - base.to(wide)))
        if not new.isfinite().all():
            raise NonFiniteError(f"{edit.tensor}: with weight {weight} its value would hold NaN or infinity")
    return result


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(merged.CHUNK) if tensor.numel() else ()


class HashingReader:
    """Reads tensors of a file and takes the file's sha256; reads each byte once if asked in the order of the file.

    All methods raise a FormatError if the file ends early.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._io = path, path.open("rb")
        self._hash, self._hashed = hashlib.sha256(), 0

    def close(self) -> None:
        self._io.close()

    def tensor(self, entry: tensors.TensorEntry) -> Tensor:
        """The tensor, in memory of its own."""
        self._hash_up_to(entry.start)
        self._io.seek(entry.start)
        tensor = tensors.read(self._io, entry)
        self._add_to_hash(entry.start, tensors.as_bytes(tensor))
        return tensor

    def pieces(self, entry: tensors.TensorEntry) -> Iterator[bytes]:
        """The tensor's bytes."""
        self._hash_up_to(entry.start)
        yield from self._range(entry.start, entry.end)

    def sha256(self) -> str:
        """Of the whole file; reads what was not read yet."""
        self._hash_up_to(self._path.stat().st_size)
        return self._hash.hexdigest()

    def _hash_up_to(self, end: int) -> None:
        for _ in self._range(self._hashed, end):
            pass

    def _range(self, start: int, end: int) -> Iterator[bytes]:
        for position in range(start, end, _READ):
            self._io.seek(position)
            size = min(_READ, end - position)
            piece = self._io.read(size)
            if len(piece) < size:
                raise FormatError(f"{self._path}: ended early; was it changed meanwhile?")
            self._add_to_hash(position, piece)
            yield piece

    def _add_to_hash(self, start: int, data: bytes | memoryview) -> None:
        new = memoryview(data)[max(self._hashed - start, 0) :]
        self._hash.update(new)
        self._hashed += len(new)


class _ByteCount:
    """Counts the bytes written and reports them."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, max(self.total, self.done))
