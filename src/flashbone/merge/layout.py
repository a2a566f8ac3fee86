"""The files of the result: which tensors each holds, in which dtype, and what lies beside them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashbone.errors import ConfigError, FormatError
from flashbone.files import tensors
from flashbone.files.base import INDEX, SINGLE, BaseModel
from flashbone.files.beside import Beside
from flashbone.files.sources import read_json
from flashbone.merge import record

DTYPES = {"bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "float16": "F16", "fp32": "F32", "float32": "F32"}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class WeightFile:
    """A file with weights to be written.

    Attributes:
        name: of the file.
        tensors: what it holds, in order.
        header: with the leading length; a `.pth` has none.
        size: bytes of the whole file.
    """

    name: str
    tensors: Sequence[_Tensor]
    header: bytes
    size: int


@dataclass(frozen=True)
class ResultLayout:
    """All files of the result but merge.json.

    Attributes:
        dtypes: of every tensor.
        weights: the files with the tensors.
        beside: the other files: path in the folder -> new content, or the file to copy.
        size: bytes of all files.
    """

    dtypes: dict[str, str]
    weights: list[WeightFile]
    beside: dict[str, bytes | Path]
    size: int


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """A dtype as files name it; None stays None.

    Raises:
        ConfigError: weights are not written in it.
    """
    if dtype is None:
        return None
    name = DTYPES.get(str(dtype).removeprefix("torch.").lower())
    if name is None:
        raise ConfigError(f"dtype: got {str(dtype)!r}, wanted one of {', '.join(DTYPES)}")
    return name


def shard_bytes(size: str | int | None) -> int | None:
    """A size such as "5GB" in bytes: KB, MB, GB count in thousands, as transformers does, KiB, MiB, GiB in 1024s.

    Raises:
        ConfigError: it is not a size.
    """
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    unit = _UNITS.get((match[2] or "B").upper()) if match else None
    count = float(match[1]) * unit if match and unit else 0.0
    if isinstance(size, bool) or not 1 <= count < math.inf:
        raise ConfigError(f"shard size: got {size!r}, wanted a positive number with a unit, such as 5GB, 500MB or 2GiB")
    return int(count)


def plan_layout(
    model: BaseModel, dtype: str | None, largest: int | None, brought: Beside, shapes: Mapping[str, tuple[int, ...]]
) -> ResultLayout:
    """Lay the result out.

    Args:
        model: The base.
        brought: What adapters bring in place of the base's files.
        shapes: Of embeddings that have more rows than the base's.
        dtype: Of all floating tensors; None keeps the base's.
        largest: Bytes of the tensors of a shard, which holds one at least; None keeps the base's files. A file whose
            dtypes stay, too, gets the base's header, byte for byte.

    Raises:
        FormatError: a dtype is asked for, and the base is quantised; all such tensors are named.
    """
    dtypes = _dtypes(model, dtype)
    if model.is_pth:
        weights = [_pth_file(model.files[0], dtypes)]
        return ResultLayout(dtypes, weights, {}, weights[0].size)
    weights = _weight_files(model, dtypes, largest, shapes)
    omitted = {record.NAME, *brought.left_out}
    beside: dict[str, bytes | Path] = {str(p): model.folder / p for p in model.companions if str(p) not in omitted}
    beside |= brought.files
    config = _with_rope_as_before(model.config if dtype is None else config_in(model.config, dtype))
    for name, shape in shapes.items():
        config = _with_vocabulary(config, model.entries[name].shape[0], shape[0])
    if config != model.config or any(file.path.parent != model.folder for file in model.files):  # or has a new head
        beside["config.json"] = _json_bytes(config)
    if largest is not None or [file.header for file in weights] != [file.header for file in model.files]:
        beside.pop(INDEX, None)
        beside |= _index(model, weights, dtype)
    sizes = [len(text) if isinstance(text, bytes) else text.stat().st_size for text in beside.values()]
    return ResultLayout(dtypes, weights, beside, sum(file.size for file in weights) + sum(sizes))


def _dtypes(model: BaseModel, dtype: str | None) -> dict[str, str]:
    entries = model.entries.values()
    small = [entry for entry in entries if entry.dtype.startswith("F") and entry.dtype not in tensors.FLOATS]
    if dtype and small:  # their scales are in other tensors
        quantised = ", ".join(f"{entry.name} ({entry.dtype})" for entry in small)
        raise FormatError(f"{model.folder}: cannot be converted to {dtype}, it is quantised: {quantised}; omit dtype")
    return {entry.name: dtype if dtype and entry.dtype in tensors.FLOATS else entry.dtype for entry in entries}


def _pth_file(file: tensors.TensorFile, dtypes: dict[str, str]) -> WeightFile:
    contents = [(entry.name, dtypes[entry.name], entry.shape) for entry in file.entries]
    grown = _bytes(contents) - sum(entry.end - entry.start for entry in file.entries)
    return WeightFile(file.path.name, contents, b"", file.size + grown)


def _weight_files(
    model: BaseModel, dtypes: dict[str, str], largest: int | None, shapes: Mapping[str, tuple[int, ...]]
) -> list[WeightFile]:
    metadata = (json.loads(model.files[0].header[8:]).get("__metadata__") if model.files else None) or {"format": "pt"}
    if largest is None:
        return [_weight_file(file, dtypes, metadata, shapes) for file in model.files]
    from huggingface_hub import split_state_dict_into_shards_factory

    contents: dict[str, Any] = {
        e.name: (e.name, dtypes[e.name], shapes.get(e.name, e.shape)) for e in model.entries.values()
    }
    shards = split_state_dict_into_shards_factory(
        contents,
        get_storage_size=lambda tensor: _bytes([tensor]),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=largest,
    ).filename_to_tensors
    return [_new_file(file, [contents[name] for name in names], metadata) for file, names in shards.items()]


def _weight_file(
    file: tensors.TensorFile,
    dtypes: dict[str, str],
    metadata: dict[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> WeightFile:
    contents = [(entry.name, dtypes[entry.name], shapes.get(entry.name, entry.shape)) for entry in file.entries]
    if contents == [(entry.name, entry.dtype, entry.shape) for entry in file.entries]:
        return WeightFile(file.path.name, contents, file.header, file.size)
    return _new_file(file.path.name, contents, metadata)


def _new_file(name: str, contents: Sequence[_Tensor], metadata: dict[str, str]) -> WeightFile:
    contents = sorted(contents, key=lambda tensor: -tensors.BITS.get(tensor[1], 0))  # so that torch can map them
    header = tensors.header(contents, metadata)
    return WeightFile(name, contents, header, len(header) + _bytes(contents))


def _index(model: BaseModel, weights: Sequence[WeightFile], dtype: str | None) -> dict[str, bytes]:
    """The index of the shards and its name; a single file needs none."""
    old = read_json(model.folder / INDEX) if any(str(path) == INDEX for path in model.companions) else {}
    if len(weights) < 2 and (not old or weights[0].name == SINGLE):
        return {}
    metadata = old["metadata"] if isinstance(old.get("metadata"), dict) else {}
    metadata = metadata | {"total_size": sum(file.size - len(file.header) for file in weights)}
    weight_map = {name: file.name for file in weights for name, _, _ in file.tensors}
    metadata = config_in(metadata, dtype) if dtype else metadata
    return {INDEX: _json_bytes({"metadata": metadata, "weight_map": weight_map})}


def config_in(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A model's config with this dtype wherever it names one, in its parts, too."""
    name = str(tensors.FLOATS[dtype]).removeprefix("torch.")
    known = [str(t).removeprefix("torch.") for t in tensors.FLOATS.values()]
    changed = {key: name for key in ("dtype", "torch_dtype") if config.get(key) in known}
    changed |= {key: config_in(part, dtype) for key, part in config.items() if isinstance(part, dict)}
    return config | changed


def _with_rope_as_before(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config and its parts, with the fields that transformers 5 writes into `rope_parameters` alone: mlx-lm
    reads only these, and silently takes a default where one is missing."""
    changed = {key: _with_rope_as_before(part) for key, part in config.items() if isinstance(part, dict)}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), (int, float)):
        before = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        before |= {"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {}
        changed |= {key: value for key, value in before.items() if config.get(key) is None}
    return config | changed


def _with_vocabulary(config: dict[str, Any], rows: int, more: int) -> dict[str, Any]:
    """A model's config and its parts with a larger vocabulary."""
    changed = {key: _with_vocabulary(part, rows, more) for key, part in config.items() if isinstance(part, dict)}
    return config | changed | ({"vocab_size": more} if config.get("vocab_size") == rows else {})


def _json_bytes(content: dict[str, Any]) -> bytes:
    """As transformers writes its files."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _bytes(contents: Sequence[_Tensor]) -> int:
    return sum(tensors.nbytes(dtype, shape) for _, dtype, shape in contents)
