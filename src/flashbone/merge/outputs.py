"""The files of the result: which tensors each holds, in which dtype, and what is written beside them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashbone.errors import ConfigError, FormatError
from flashbone.files import tensors
from flashbone.files.base import INDEX, SINGLE, BaseModel
from flashbone.files.sources import read_json

DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), "BF16"),
    **dict.fromkeys(("fp16", "float16"), "F16"),
    **dict.fromkeys(("fp32", "float32"), "F32"),
}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_Layout = Sequence[tuple[str, str, tuple[int, ...]]]


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to be written.

    Attributes:
        name: of the file.
        layout: what it holds, in order: (name, dtype, shape).
        header: with the leading length.
    """

    name: str
    layout: _Layout
    header: bytes

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + _bytes(self.layout)


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
        ConfigError: it is none.
    """
    if size is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    unit = _UNITS.get((found[2] or "B").upper()) if found else None
    count = float(found[1]) * unit if found and unit else 0.0
    if isinstance(size, bool) or not 1 <= count < math.inf:
        raise ConfigError(f"shard size: got {size!r}, wanted a positive number with a unit, such as 5GB, 500MB or 2GiB")
    return int(count)


def converted_dtypes(model: BaseModel, dtype: str | None) -> dict[str, str]:
    """Dtype of every tensor of the result: `dtype` where it is floating, else the base's own.

    Raises:
        FormatError: tensors of 8 bits and fewer, whose scales lie elsewhere; all are named.
    """
    small = [n for n, e in model.entries.items() if dtype and e.dtype.startswith("F") and e.dtype not in tensors.FLOATS]
    if small:
        found = ", ".join(f"{name} ({model.entries[name].dtype})" for name in small)
        raise FormatError(f"{model.folder}: no dtype can be given, these are quantised: {found}; leave it out")
    return {n: dtype if dtype and e.dtype in tensors.FLOATS else e.dtype for n, e in model.entries.items()}


def output_files(model: BaseModel, dtypes: Mapping[str, str], largest: int | None) -> list[OutputFile]:
    """The files of the result: those of the base, or new shards of at most so many bytes, one tensor at least.

    Args:
        model: The base.
        dtypes: Of every tensor.
        largest: Bytes of the tensors of a shard; None keeps the base's files. With its dtypes, too, their headers are
            the base's byte for byte.
    """
    if largest is None:
        groups = [[(e.name, dtypes[e.name], e.shape) for e in file.entries] for file in model.files]
        names = [file.path.name for file in model.files]
    else:
        groups = _shards([(n, dtypes[n], e.shape) for n, e in model.entries.items()], largest)
        names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        names = [SINGLE] if len(groups) == 1 else names
    metadata = _metadata(model) if model.files else None
    files = []
    for name, layout, file in zip(names, groups, model.files if largest is None else [None] * len(groups), strict=True):
        if file is not None and all(entry.dtype == dtypes[entry.name] for entry in file.entries):
            files.append(OutputFile(name, layout, file.header))
            continue
        layout = sorted(layout, key=lambda t: -tensors.BITS.get(t[1], 0))  # so that torch can map them
        files.append(OutputFile(name, layout, tensors.header(layout, metadata)))
    return files


def _shards(layout: _Layout, largest: int) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    groups, free = [[]], largest
    for tensor in layout:
        size = tensors.nbytes(*tensor[1:])
        if size > free and groups[-1]:
            groups.append([])
            free = largest
        groups[-1].append(tensor)
        free -= size
    return groups


def _metadata(model: BaseModel) -> dict[str, str]:
    """Of the base's first header; transformers wants to find a format there."""
    return json.loads(model.files[0].header[8:]).get("__metadata__") or {"format": "pt"}


def index(model: BaseModel, files: Sequence[OutputFile], dtype: str | None) -> bytes | None:
    """The index of the shards, if there are several or the base has one."""
    old = read_json(model.folder / INDEX) if any(str(path) == INDEX for path in model.companions) else {}
    if len(files) < 2 and (not old or files[0].name == SINGLE):
        return None
    weight_map = {name: file.name for file in files for name, _, _ in file.layout}
    known = old.get("metadata")
    metadata = (known if isinstance(known, dict) else {}) | {"total_size": sum(_bytes(f.layout) for f in files)}
    content = {"metadata": config_in(metadata, dtype) if dtype else metadata, "weight_map": weight_map}
    return json_bytes(content)


def config_in(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A model's config that names this dtype wherever it names one, in its parts, too."""
    name = str(tensors.FLOATS[dtype]).removeprefix("torch.")
    known = {str(t).removeprefix("torch.") for t in tensors.FLOATS.values()}

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: changed(k, v) for k, v in value.items()}
        return name if key in ("dtype", "torch_dtype") and value in known else value

    return changed("", config)


def json_bytes(content: dict[str, Any]) -> bytes:
    """As transformers writes its files."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _bytes(layout: _Layout) -> int:
    return sum(tensors.nbytes(dtype, shape) if dtype in tensors.BITS else 0 for _, dtype, shape in layout)
