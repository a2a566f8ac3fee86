"""merge.json: what went into a merged folder."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashbone import __version__
from flashbone.errors import FormatError
from flashbone.files import reading
from flashbone.files.base import BaseModel
from flashbone.files.beside import Beside
from flashbone.files.sources import read_json
from flashbone.merge.plan import WeightedAdapter

NAME = "merge.json"
_NOT_HASHED_YET = "0" * 64  # as long as a sha256, so that the size of merge.json is known before the merge


@dataclass
class HashedFile:
    """A file that went in; its name is relative to its folder."""

    name: str
    bytes: int
    sha256: str = _NOT_HASHED_YET


@dataclass(frozen=True)
class RecordedBase:
    """The base: its path or hub id, and its files."""

    name: str
    files: list[HashedFile]


@dataclass(frozen=True)
class RecordedAdapter:
    """An adapter that went in; `r` is a list if its blocks differ in size."""

    name: str
    variant: str
    r: int | list[int]
    weight: float
    files: list[HashedFile]


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor that is not the base's: "merged", "replaced", "replaced and merged" or "converted"; its dtype there."""

    change: str
    dtype: str


@dataclass(frozen=True)
class MergeRecord:
    """The content of merge.json.

    Attributes:
        flashbone: the version that merged.
        base: the base that went in.
        adapters: the adapters that went in.
        dtype: that was asked for; None if the base's were kept.
        tensors: the tensors that changed.
        base_record: merge.json of the base, if that was a merged folder itself.
    """

    flashbone: str
    base: RecordedBase
    adapters: list[RecordedAdapter]
    dtype: str | None
    tensors: dict[str, ChangedTensor]
    base_record: dict[str, Any] | None

    def set_hashes(self, sha256: Mapping[str, str]) -> None:
        """Fill in the hashes of the base's files, by name."""
        for file in self.base.files:
            file.sha256 = sha256[file.name]

    def to_bytes(self) -> bytes:
        """The file's content; bytes of a path that are not UTF-8 become JSON's escapes."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        return f"{text}\n".encode(errors="backslashreplace")


def make_record(
    model: BaseModel,
    adapters: Sequence[WeightedAdapter],
    brought: Beside,
    dtype: str | None,
    changes: Mapping[str, str],
) -> MergeRecord:
    """The record of a merge, without the hashes of the base's files.

    Raises:
        FormatError: the base has a merge.json that flashbone did not write.
    """
    base_files = [HashedFile(file.path.name, file.size) for file in model.files]
    omitted = {NAME, *brought.left_out, *brought.files}
    beside = [path for path in model.companions if str(path) not in omitted]
    base_files += [HashedFile(str(path), (model.folder / path).stat().st_size) for path in beside]
    return MergeRecord(
        flashbone=__version__,
        base=RecordedBase(_name_of(model.folder), base_files),
        adapters=[_recorded(adapter, brought) for adapter in adapters],
        dtype=dtype,
        tensors={name: ChangedTensor(change, model.entries[name].dtype) for name, change in changes.items()},
        base_record=None if model.is_pth else _read(model.folder),
    )


def _read(folder: Path) -> dict[str, Any] | None:
    """merge.json of a folder, with the fields of older versions; None if it has none."""
    file = folder / NAME
    if not file.is_file():
        return None
    record = read_json(file)
    missing = [field.name for field in dataclasses.fields(MergeRecord) if field.name not in record]
    if missing:
        raise FormatError(
            f"{file}: flashbone did not write this, it lacks {', '.join(missing)}; rename or remove it, since the"
            " merged folder gets a file of this name"
        )
    return record


def _recorded(adapter: WeightedAdapter, brought: Beside) -> RecordedAdapter:
    sizes = sorted({block.shape[-2] for block in adapter.adapter.blocks.values()})
    along = [file for file in brought.files.values() if file.parent == adapter.path]
    contents = [(file.name, file.read_bytes()) for file in [*reading.files_of(adapter.path), *along]]
    return RecordedAdapter(
        name=_name_of(adapter.path),
        variant=adapter.adapter.variant.name,
        r=sizes[0] if len(sizes) == 1 else sizes,
        weight=adapter.weight,
        files=[HashedFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in contents],
    )


def _name_of(path: Path) -> str:
    """The path; of a folder in the hub's cache the id and the commit."""
    parts = path.absolute().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return f"{parts[-3].removeprefix('models--').replace('--', '/')}@{parts[-1]}"
    return str(path)
