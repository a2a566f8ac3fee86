"""merge.json: what went into a merged folder, and the hashes by which a merge is found to have been taken back.

flashbone     version that merged
base          name, and files: name, bytes and sha256 of each that went in
adapters      of each: name, variant, r, weight, and files as above
dtype         that was asked for; null: as the base has it
tensors       of each that is not the base's byte for byte: change ("merged", "replaced", "replaced and merged",
              "converted"), and dtype and sha256 of the original
result        of each tensor of the result: dtype, shape and sha256; all zeros if it came out of another merge since
base_config   text of the base's config.json where the merged one differs
base_record   merge.json of the base, if that was a merged folder itself
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashbone import __version__
from flashbone.errors import FormatError
from flashbone.files import reading, tensors
from flashbone.files.base import BaseModel
from flashbone.files.sources import read_json
from flashbone.merge.plan import LARGEST_WEIGHT, Weighted

NAME = "merge.json"
UNKNOWN = "0" * 64  # a sha256 that is not known yet, as long as any
_CHANGES = ("merged", "replaced", "replaced and merged", "converted")


def read(folder: Path) -> dict[str, Any] | None:
    """The record of a merged folder; None if there is none.

    Raises:
        FormatError: there is one, and flashbone did not write it so; every bad field is named.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    record = read_json(file)
    inner, where, problems = record, "", []
    while inner is not None and not problems:
        problems = [where + problem for problem in _problems(inner)]
        inner, where = (inner.get("base_record") if isinstance(inner, dict) else None), f"{where}base_record."
    if problems:
        raise FormatError(
            f"{file}: flashbone did not write this, or it is damaged: {', '.join(problems)}; it writes a file of that"
            " name, so rename or remove it"
        )
    return record


def _problems(record: Any) -> Iterator[str]:
    """Names of the fields that are not as a merge writes them."""
    if not isinstance(record, dict):
        yield "not an object"
        return
    for field, is_good in (("tensors", _is_changed), ("result", _is_result)):
        entries = record.get(field)
        if not isinstance(entries, dict):
            yield field
        else:
            yield from (f"{field}.{name}" for name, entry in entries.items() if not is_good(entry))
    adapters = record.get("adapters")
    if not isinstance(adapters, list) or not adapters:
        yield "adapters"
    else:
        yield from (f"adapters[{i}]" for i, entry in enumerate(adapters) if not _is_adapter(entry))
    config = record.get("base_config")
    if config is not None and not (isinstance(config, str) and _is_unicode(config)):
        yield "base_config"


def _is_changed(entry: Any) -> bool:
    is_whole = isinstance(entry, dict) and {"change", "dtype"} <= entry.keys() and _is_hashed(entry)
    return is_whole and entry["change"] in _CHANGES and entry["dtype"] in list(tensors.FLOATS)


def _is_result(entry: Any) -> bool:
    return _is_hashed(entry) and isinstance(entry.get("dtype"), str) and isinstance(entry.get("shape"), list)


def _is_adapter(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    weight, files = entry.get("weight"), entry.get("files")
    is_weight = isinstance(weight, float) and abs(weight) <= LARGEST_WEIGHT  # NaN is not
    return is_weight and isinstance(files, list) and bool(files) and all(map(_is_hashed, files))


def _is_hashed(entry: Any) -> bool:
    return isinstance(entry, dict) and re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))) is not None


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def draft(
    model: BaseModel,
    adapters: Sequence[tuple[Path, Weighted]],
    dtype: str | None,
    changes: Mapping[str, str],
    dtypes: Mapping[str, str],
    base_config: bytes | None,
) -> dict[str, Any]:
    """The record with every hash of the base still unknown; it is as long as it will be.

    Args:
        model: The base.
        adapters: Paths and what was read from them.
        dtype: As in the record.
        changes: Tensor -> what happens to it.
        dtypes: Of every tensor of the result.
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
        "result": {
            name: {"dtype": dtypes[name], "shape": list(entry.shape), "sha256": UNKNOWN}
            for name, entry in model.entries.items()
        },
        "base_config": None if base_config is None else base_config.decode(),
        "base_record": None if model.is_pth else read(model.folder),
    }


def fill(
    record: dict[str, Any], files: Mapping[str, str], originals: Mapping[str, str], results: Mapping[str, str]
) -> None:
    """Put in the hashes of the base's files, of its tensors that changed, and of all tensors of the result."""
    for file in record["base"]["files"]:
        file["sha256"] = files[file["name"]]
    for name, tensor in record["tensors"].items():
        tensor["sha256"] = originals[name]
    for name, tensor in record["result"].items():
        tensor["sha256"] = results[name]


def to_bytes(record: dict[str, Any]) -> bytes:
    """As it is written; bytes of a path that are no UTF-8 become JSON's own escapes."""
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def name_of(path: Path) -> str:
    """A folder's name; of one in the hub's cache the id and the commit."""
    parts = path.absolute().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return f"{parts[-3].removeprefix('models--').replace('--', '/')}@{parts[-1]}"
    return str(path)


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
