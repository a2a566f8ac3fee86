"""The safetensors layout: find the tensors of a file, and write the file again with some of them changed.

A file is 8 bytes with the length of the header (little endian), the header (JSON: name -> dtype, shape, offsets), and
the data without gaps. As long as no dtype and no shape changes, the header of a changed file is that of its source,
byte for byte, and the tensors can be streamed in the order of their offsets: one of them is in memory at a time.
"""

import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flashbone.errors import FormatError, visible

# In the order of the safetensors library's own files.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = FLOATS | {"BOOL": torch.bool, "C64": torch.complex64, "C128": torch.complex128}
DTYPES |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
DTYPES |= {f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Bits of an element of every dtype that the format knows; C128 is known to torch's files alone.
BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items() if name != "C128"}
BITS |= {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
# A header in memory takes ten times its bytes: room for 200,000 tensors. torch has no more axes than 64.
_MAX_HEADER, MAX_AXES = 20_000_000, 64

Piece = bytes | bytearray | memoryview
Layout = Sequence[tuple[str, str, tuple[int, ...]]]  # of a file: name, dtype such as "BF16", and shape of each tensor


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; its bytes are [start, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: its raw header with the leading length, its tensors in the order of their offsets, its bytes.

    A `.pth` file has no header, and its tensors are in the order of its dict.
    """

    path: Path
    header: bytes
    entries: tuple[TensorEntry, ...]
    size: int


def scan(path: Path) -> TensorFile:
    """Read a file's header and check it against the file's size; no tensor is read.

    Raises:
        FormatError: it is not a whole safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if length > _MAX_HEADER and size > length:
            raise FormatError(
                f"{path}: its header has {length:,} bytes, at most {_MAX_HEADER:,} are read; is it damaged?"
            )
        if len(head) < 8 or length > size - 8:
            raise FormatError(f"{path}: not a whole safetensors file; it may be truncated, copy or download it again")
        text = file.read(length)
    try:
        table: dict[str, Any] = json.loads(text, object_pairs_hook=_without_twins)
        table.pop("__metadata__", None)
        entries = [_entry(name, fields, 8 + length) for name, fields in table.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise FormatError(f"{path}: its header is not that of a safetensors file ({error})") from error
    entries.sort(key=lambda entry: (entry.start, entry.end))
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            raise FormatError(f"{path}: tensor {entry.name} overlaps another, or leaves a gap; the file is damaged")
        end = entry.end
    if end != size:
        raise FormatError(
            f"{path}: its header promises {end} bytes, the file has {size}; it may be truncated, copy or download it"
            " again"
        )
    return TensorFile(path, head + text, tuple(entries), size)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twins = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"it names {', '.join(map(visible, twins))} twice")
    return table


def _entry(name: str, fields: dict[str, Any], data_start: int) -> TensorEntry:
    shape = tuple(operator.index(n) for n in fields["shape"])
    if len(shape) > MAX_AXES:
        raise ValueError(f"tensor {name} has {len(shape)} axes, at most {MAX_AXES} are possible")
    start, end = (operator.index(n) for n in fields["data_offsets"])
    entry = TensorEntry(name, str(fields["dtype"]), shape, data_start + start, data_start + end)
    if start < 0 or end < start or any(n < 0 for n in shape):
        raise ValueError(f"tensor {name} has negative sizes")
    if entry.dtype not in BITS:
        raise ValueError(
            f"tensor {name}: dtype {visible(entry.dtype)!r} is unknown; was it written by a newer safetensors?"
        )
    if 8 * (end - start) != math.prod(shape) * BITS[entry.dtype]:
        raise ValueError(f"tensor {name}: {end - start} bytes are not {entry.dtype} of shape {shape}")
    return entry


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this dtype, named as in the header.

    Raises:
        FormatError: the dtype is unknown.
    """
    if dtype not in BITS:
        raise FormatError(f"dtype: got {dtype!r}, wanted one of {', '.join(BITS)}")
    return -(-math.prod(shape) * BITS[dtype] // 8)


def header(layout: Layout, metadata: Mapping[str, str] | None = None) -> bytes:
    """What comes before the data of a file with these tensors, in this order."""
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in layout:
        start, end = end, end + nbytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> int:
    """Bytes of the file that the safetensors library writes for tensors of these dtypes and shapes, header included.

    It sorts by dtype, the widest first, then by name.
    """
    names = {dtype: name for name, dtype in FLOATS.items()}
    order = list(names)
    layout = [
        (name, names[dtype], shape)
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (order.index(item[1][0]), item[0]))
    ]
    return len(header(layout, metadata)) + sum(nbytes(dtype, shape) for _, dtype, shape in layout)


def write(
    target: Path,
    layout: Layout,
    content: Callable[[str], Iterable[Piece]],
    advance: Callable[[int], None],
    metadata: Mapping[str, str] | None = None,
    given_header: bytes | None = None,
) -> None:
    """Write a new file, tensor by tensor.

    Args:
        target: Must not exist.
        layout: In the order in which the tensors are written. torch reads a file only if each tensor starts at a
            multiple of its item size: the widest dtypes come first.
        content: Yields the bytes of the tensor of that name, in pieces.
        advance: Called with the number of bytes after each piece that was written.
        metadata: Of the header.
        given_header: Written as it is, instead of a header made of layout and metadata.
    """
    start = header(layout, metadata) if given_header is None else given_header
    with target.open("xb") as file:
        file.write(start)
        advance(len(start))
        for name, dtype, shape in layout:
            written = _put(file, content(name), advance)
            assert written == nbytes(dtype, shape), f"{name}: {written} bytes are not {dtype} of shape {shape}"


def _put(file: BinaryIO, pieces: Iterable[Piece], advance: Callable[[int], None]) -> int:
    """Write pieces and drop each before the next, since a piece may be a tensor's memory."""
    written = 0
    for piece in pieces:
        count = memoryview(piece).nbytes
        file.write(piece)
        advance(count)
        written += count
    return written


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; they share its memory."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def read(file: BinaryIO, entry: TensorEntry) -> Tensor:
    """The tensor at the file's position, which must be the entry's start; new memory."""
    data = bytearray(entry.end - entry.start)
    if file.readinto(data) != len(data):  # pyright: ignore[reportAttributeAccessIssue]
        raise FormatError(f"{file.name}: ended in the middle of {entry.name}; was it changed meanwhile?")
    dtype = FLOATS[entry.dtype]
    return torch.frombuffer(data, dtype=dtype).view(entry.shape) if data else torch.empty(entry.shape, dtype=dtype)
