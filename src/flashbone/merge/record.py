"""merge.json: what went into a merged folder, and the hashes by which a merge is found to have been taken back.

flashbone     version that merged
base          name, and files: name, bytes and sha256 of each that went in
adapters      of each: name, variant, r, weight, and files as above
dtype         that was asked for; null: as the base has it
tensors       of each that is not the base's byte for byte: change ("merged", "replaced", "replaced and merged",
              "converted"), and dtype and sha256 of the original
base_config   text of the base's config.json where the merged one differs
base_record   merge.json of the base, if that was a merged folder itself
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashbone import __version__
from flashbone.checkpoint import reading
from flashbone.checkpoint.base import BaseModel
from flashbone.errors import FormatError
from flashbone.merge.plan import Weighted
from flashbone.sources import read_json

NAME = "merge.json"
UNKNOWN = "0" * 64  # a sha256 that is not known yet, as long as any


def read(folder: Path) -> dict[str, Any] | None:
    """The record of a merged folder; None if there is none.

    Raises:
        FormatError: there is one, and flashbone did not write it.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    record = read_json(file)
    tensors, adapters = record.get("tensors"), record.get("adapters")
    whole = isinstance(tensors, dict) and all(
        isinstance(t, dict) and {"change", "dtype", "sha256"} <= t.keys() for t in tensors.values()
    )
    if not whole or not isinstance(adapters, list) or not all(map(_is_adapter, adapters)):
        raise FormatError(f"{file}: flashbone did not write this, and writes a file of that name; rename or remove it")
    return record


def _is_adapter(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("weight"), float) and isinstance(entry.get("files"), list)


def draft(
    model: BaseModel,
    adapters: Sequence[tuple[Path, Weighted]],
    dtype: str | None,
    changes: Mapping[str, str],
    base_config: bytes | None,
) -> dict[str, Any]:
    """The record with every hash of the base still unknown; it is as long as it will be.

    Args:
        model: The base.
        adapters: Paths and what was read from them.
        dtype: As in the record.
        changes: Tensor -> what happens to it.
        base_config: As in the record.
    """
    files = [(f.path.name, f.size) for f in model.files]
    beside = [path for path in model.companions if str(path) != NAME]
    files += [(str(path), (model.folder / path).stat().st_size) for path in beside]
    return {
        "flashbone": __version__,
        "base": {
            "name": name_of(model.folder),
            "files": [{"name": name, "bytes": size, "sha256": UNKNOWN} for name, size in files],
        },
        "adapters": [_adapter(path, one) for path, one in adapters],
        "dtype": dtype,
        "tensors": {
            name: {"change": change, "dtype": model.entries[name].dtype, "sha256": UNKNOWN}
            for name, change in changes.items()
        },
        "base_config": None if base_config is None else base_config.decode(),
        "base_record": None if model.is_pth else read(model.folder),
    }


def fill(record: dict[str, Any], files: Mapping[str, str], originals: Mapping[str, str]) -> None:
    """Put in the hashes of the base's files and of its tensors that changed."""
    for file in record["base"]["files"]:
        file["sha256"] = files[file["name"]]
    for name, tensor in record["tensors"].items():
        tensor["sha256"] = originals[name]


def to_bytes(record: dict[str, Any]) -> bytes:
    """As it is written."""
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def name_of(path: Path) -> str:
    """A folder's name; of one in the hub's cache the id and the commit."""
    parts = path.absolute().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return f"{parts[-3].removeprefix('models--').replace('--', '/')}@{parts[-1]}"
    return str(path)


def hashes(path: Path) -> list[str]:
    """sha256 of every file of an adapter."""
    return [file["sha256"] for file in _files(path)]


def _files(path: Path) -> list[dict[str, Any]]:
    found = [(file.name, file.read_bytes()) for file in reading.files_of(path)]
    return [{"name": n, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in found]


def _adapter(path: Path, one: Weighted) -> dict[str, Any]:
    sizes = {block.shape[-2] for block in one.adapter.blocks.values()}
    return {
        "name": name_of(path),
        "variant": one.adapter.variant.name,
        "r": sorted(sizes)[0] if len(sizes) == 1 else sorted(sizes),
        "weight": one.weight,
        "files": _files(path),
    }
