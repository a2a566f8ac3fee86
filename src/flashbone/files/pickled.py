"""The pickle inside torch's files: a dict of tensors, read as records of them. No pickled code is ever run."""

import errno
import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import _utils

from flashbone.errors import FormatError
from flashbone.files.tensors import DTYPES, MAX_AXES

# dtype -> torch's class of its storages; dtypes that came later have none.
_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "BF16": "BFloat16Storage",
    "F16": "HalfStorage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
    "C64": "ComplexFloatStorage",
    "C128": "ComplexDoubleStorage",
}
_BYTES = "UntypedStorage"
MOST_TENSORS = 200_000


class PickledStorage(NamedTuple):
    """The member `data/<key>` of a file: `size` numbers, or bytes where the dtype is `UntypedStorage`."""

    dtype: str
    key: str
    size: int

    @property
    def nbytes(self) -> int:
        """Of the member."""
        return self.size * (1 if self.dtype == _BYTES else DTYPES[self.dtype].itemsize)


class PickledTensor(NamedTuple):
    """A tensor: a view of a storage. Offset and strides are counted in numbers."""

    storage: PickledStorage
    dtype: str
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]
    metadata: Any = None

    @property
    def start(self) -> int:
        """First byte in the storage."""
        return self.offset * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Of a contiguous tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def extent(self) -> int:
        """Bytes from its first number to its last; for a contiguous tensor, all its bytes."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return 0 if 0 in self.shape else (last + 1) * DTYPES[self.dtype].itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether its numbers lie in order; the strides of axes of one number do not matter."""
        pairs = zip(self.shape, self.stride, _strides(self.shape), strict=True)
        return 0 in self.shape or all(got == want for size, got, want in pairs if size != 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """What torch rebuilds it with."""
        view = (self.storage, self.offset, self.shape, self.stride, False, OrderedDict())
        if self.storage.dtype == _BYTES:
            return _utils._rebuild_tensor_v3, (*view, DTYPES[self.dtype])
        return _utils._rebuild_tensor_v2, view


def whole(dtype: str, shape: tuple[int, ...], key: str) -> PickledTensor:
    """A tensor that fills its storage."""
    count = math.prod(shape)
    storage = (
        PickledStorage(dtype, key, count)
        if dtype in _STORAGES
        else PickledStorage(_BYTES, key, count * DTYPES[dtype].itemsize)
    )
    return PickledTensor(storage, dtype, shape, 0, _strides(shape))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def dump(table: Mapping[str, PickledTensor]) -> bytes:
    """The pickle of a dict of tensors, as torch writes it."""
    file = io.BytesIO()
    _Pickler(file, protocol=2).dump(dict(table))
    return file.getvalue()


def value(path: Path, file: BinaryIO) -> Any:
    """The next pickle of a file: numbers, texts, lists, dicts and records of tensors.

    Raises:
        FormatError: it asks for code.
        Exception: of any kind, where it is damaged.
    """
    return _Unpickler(path, file).load()


def table(path: Path, file: BinaryIO, views: bool = False) -> dict[str, PickledTensor]:
    """The next pickle, which has to be a dict of contiguous tensors; with `views` their axes may be in any order.

    Raises:
        FormatError: it asks for code, or holds something else; everything but such tensors is named.
        Exception: of any kind, where it is damaged.
    """
    content = value(path, file)
    if not isinstance(content, dict):
        kind = "tensor" if isinstance(content, PickledTensor) else type(content).__name__
        raise FormatError(f"{path}: wanted a dict of tensors by name, it holds a {kind}")
    if len(content) > MOST_TENSORS:
        raise FormatError(
            f"{path}: it holds {len(content):,} tensors, at most {MOST_TENSORS:,} are read; is it damaged?"
        )
    problems = [problem for name, item in content.items() if (problem := _problem(name, item, views))]
    if problems:
        raise FormatError(f"{path}: wanted a dict of tensors by name; {'; '.join(problems)}")
    return content


def _problem(name: Any, value: Any, views: bool) -> str:
    """What is wrong with an item; empty if nothing is."""
    if not isinstance(name, str):
        return f"a key is a {type(name).__name__}"
    if isinstance(value, dict):
        return f"{name} is a dict; save that of the model alone"
    if not isinstance(value, PickledTensor):
        return f"{name} is a {type(value).__name__}"
    if value.metadata:
        return f"{name} is a conjugated or negated view; save its resolve_conj().resolve_neg()"
    fits = value.nbytes <= value.extent if views else value.is_contiguous  # expanded views claim more than there is
    return "" if fits else f"{name} is a view that is not contiguous; save its contiguous()"


def is_of_the_disk(error: Exception) -> bool:
    """Whether an error in reading a pickle is the disk's, not the damaged file's: a seek before the start is EINVAL."""
    return isinstance(error, OSError) and error.errno != errno.EINVAL


class _Pickler(pickle.Pickler):
    """Pickles storages by their names, as torch does."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, PickledStorage):
            return None
        storage = torch.UntypedStorage if obj.dtype == _BYTES else getattr(torch, _STORAGES[obj.dtype])
        return ("storage", storage, obj.key, "cpu", obj.size)


class _Unpickler(pickle._Unpickler):
    """Unpickles tensors as records.

    Python's unpickler, since C's allocates memory for any index that a pickle holds.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise FormatError(
                f"{self._path}: refused, its pickle asks for {module}.{name}, which plain tensors do not need (pickles"
                " can run code); where you trust it, load it and torch.save() a dict of tensors"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> PickledStorage:
        kind, dtype, key, _location, size, *view = pid
        if any(view) or len(view) > 1:
            raise ValueError("its pickle holds a view of a storage; save it with a newer torch")
        if kind != "storage" or dtype not in (*_STORAGES, _BYTES) or not isinstance(key, str) or not _is_size(size):
            raise ValueError("its pickle names an invalid storage")
        return PickledStorage(dtype, key, size)


def _rebuild_v2(storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, metadata: Any = None):
    return _rebuild_v3(storage, offset, shape, stride, _grad, _hooks, storage.dtype, metadata)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
):
    sizes = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
    known = isinstance(storage, PickledStorage) and dtype in DTYPES
    if not (known and sizes and len(shape) <= MAX_AXES and all(map(_is_size, (offset, *shape, *stride)))):
        raise ValueError("its pickle rebuilds an invalid tensor")
    return PickledTensor(storage, dtype, shape, offset, stride, metadata)


def _rebuild_parameter(data: Any, _grad: Any, _hooks: Any) -> Any:
    return data


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# All that a pickle may ask for. A class of storages and a dtype become a name.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", _BYTES): _BYTES,
    ("torch.storage", _BYTES): _BYTES,
    **{(module, storage): name for name, storage in _STORAGES.items() for module in ("torch", "torch.cuda")},
    **{("torch", str(dtype).removeprefix("torch.")): name for name, dtype in DTYPES.items()},
}
