"""Writing a changed model: tensor by tensor, whole or not at all."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flashbone.errors import FlashboneError
from flashbone.files import pth, staging, tensors
from flashbone.files.base import INDEX, BaseModel
from flashbone.merge import record, source
from flashbone.merge.outputs import OutputFile, index, output_files

CONFIG = "config.json"
_PIECE = 1 << 24  # bytes of a changed tensor that are written at once


@dataclass(frozen=True)
class Job:
    """What to write.

    Attributes:
        model: the model that is read.
        out: the new folder, or the `.pth` file if the model is one.
        dtypes: of every tensor of the result.
        edits: tensor -> function of it, as it is stored, and of the dtype that it gets; it may overwrite what it gets.
            All other tensors are copied.
        shard_bytes: largest shard, see `output_files`.
        texts: files that are written instead of those of the model, or beside them; their content.
        dtype: the one of all floating tensors, if there is one.
        is_hashed: whether to hash every tensor of the result.
        check: called with the finished folder or file before it appears; may raise.
        progress: called with the bytes written so far and those to write.
    """

    model: BaseModel
    out: Path
    dtypes: Mapping[str, str]
    edits: Mapping[str, Callable[[Tensor, torch.dtype], Tensor]]
    shard_bytes: int | None = None
    texts: Mapping[str, bytes] = field(default_factory=dict)
    dtype: str | None = None
    is_hashed: bool = False
    check: Callable[[Path], None] | None = None
    progress: Callable[[int, int], None] | None = None


@dataclass
class Read:
    """sha256 of the model's files by name, of the original tensors that `edits` changed, and of those written."""

    files: dict[str, str] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)


def run(job: Job, last: tuple[str, Callable[[Read], bytes], int] | None = None) -> tuple[int, Read]:
    """Write the result; it appears whole, or not at all.

    Args:
        job: What to write.
        last: A file of the folder that is written at the end: its name, its content, and the size that it will have.

    Returns:
        The bytes written, and what was read.

    Raises:
        FlashboneError: `out` exists, or the disk is full.
        FormatError: a file of the model ended early.
    """
    if job.model.is_pth:
        return _run_pth(job)
    files = output_files(job.model, job.dtypes, job.shard_bytes)
    texts, copied = _beside(job, files)
    total = sum(f.size for f in files) + sum(map(len, texts.values())) + (last[2] if last else 0)
    total += sum((job.model.folder / path).stat().st_size for path in copied)
    staging.check(job.out, total, job.model.folder)
    count = _Count(job.progress, total)
    with staging.whole_or_absent(job.out) as folder:
        run = _Run(job)
        for path in copied:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            run.read.files[str(path)] = _copy(job.model.folder / path, folder / path)
            count((folder / path).stat().st_size)
        for name in [n for n in job.texts if (job.model.folder / n).is_file()]:
            run.read.files[name] = hashlib.sha256((job.model.folder / name).read_bytes()).hexdigest()
        if (old := job.model.folder / INDEX).is_file():
            run.read.files.setdefault(INDEX, hashlib.sha256(old.read_bytes()).hexdigest())
        for name, content in texts.items():
            _put(folder / name, content, count)
        with run:
            for file in files:
                tensors.write(folder / file.name, file.layout, run.content, count, given_header=file.header)
        if last is not None:
            content = last[1](run.read)
            assert len(content) == last[2], f"{last[0]} is not as long as it was to be"
            _put(folder / last[0], content, count)
        if job.check is not None:
            job.check(folder)
    return count.done, run.read


def _run_pth(job: Job) -> tuple[int, Read]:
    file = job.model.files[0]
    if job.out.suffix != ".pth":
        raise FlashboneError(f"{job.out}: {job.model.folder} is one file, and so is the result; name it {job.out}.pth")
    tied = pth.tied(file)
    layout = [(e.name, job.dtypes[e.name], e.shape) for e in file.entries]
    total = file.size + sum(tensors.nbytes(d, s) for _, d, s in layout) - sum(e.end - e.start for e in file.entries)
    staging.check(job.out, total, job.model.folder, is_file=True)
    count = _Count(job.progress, total)
    with staging.whole_or_absent(job.out, is_file=True) as target:
        with _Run(job) as run:
            pth.write(target, layout, run.content, count, tied)
        for found in (run.read.originals, run.read.results):
            found |= {n: found[o] for n, o in tied.items() if o in found}
        if job.check is not None:
            job.check(target)
    return count.done, run.read


def _beside(job: Job, files: list[OutputFile]) -> tuple[dict[str, bytes], list[Path]]:
    """The files that are written beside the weights, and the paths of those that are copied."""
    texts = dict(job.texts)
    copied = [path for path in job.model.companions if str(path) not in (*texts, record.NAME)]
    is_rewritten = job.shard_bytes is not None or [f.header for f in files] != [f.header for f in job.model.files]
    if is_rewritten:
        copied = [path for path in copied if str(path) != INDEX]
        content = index(job.model, files, job.dtype)
        texts |= {} if content is None else {INDEX: content}
    return texts, copied


class _Count:
    """Counts bytes, and says so."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, max(self.total, self.done))


class _Run:
    """The readers of the model's files while the result is written."""

    def __init__(self, job: Job) -> None:
        self.job, self.read = job, Read()
        self._readers: dict[str, source.Reader] = {}
        self._place: dict[str, tuple[tensors.Entry, source.Reader]] = {}

    def __enter__(self) -> "_Run":
        for file in self.job.model.files:
            reader = self._readers[file.path.name] = source.Reader(file)
            self._place |= {entry.name: (entry, reader) for entry in file.entries}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.read.files |= {name: reader.sha256() for name, reader in self._readers.items()}
        for reader in self._readers.values():
            reader.close()

    def content(self, name: str) -> Iterator[tensors.Piece]:
        """The bytes of a tensor of the result."""
        if not self.job.is_hashed:
            yield from self._pieces(name)
            return
        found = hashlib.sha256()
        for piece in self._pieces(name):
            found.update(piece)
            yield piece
        self.read.results[name] = found.hexdigest()

    def _pieces(self, name: str) -> Iterator[tensors.Piece]:
        entry, reader = self._place[name]
        edit = self.job.edits.get(name)
        if edit is None:
            yield from reader.pieces(entry)
            return
        stored = reader.tensor(entry)
        self.read.originals[name] = source.sha256_of(stored)
        data = tensors.as_bytes(edit(stored, tensors.FLOATS[self.job.dtypes[name]]))
        del stored
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]


def _put(file: Path, content: bytes, count: _Count) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    count(len(content))


def _copy(old: Path, new: Path) -> str:
    """Copy a file, a link's target as a file; its sha256."""
    shutil.copy(old, new)
    found = hashlib.sha256()
    with new.open("rb") as file:
        while piece := file.read(source.PIECE):
            found.update(piece)
    return found.hexdigest()
