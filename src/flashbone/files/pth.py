"""torch's zipped pickles, in which RWKV models come: find the tensors of a file, and write such a file.

A file is a zip of stored members in one folder: `data.pkl`, a pickled dict: name -> how to rebuild the tensor from a
storage; `data/<key>`, the bytes of each storage; `byteorder`; `version`. No tensor is read to find it; a file is
written one tensor at a time, each at a multiple of 64 bytes.
"""

import bisect
import io
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flashbone.errors import FormatError, one_line
from flashbone.files import pickled
from flashbone.files.tensors import DTYPES, Layout, Piece, TensorEntry, TensorFile

_MAGIC = 0x1950A86A20F9469CFC6C  # of torch before 1.6
_MOST_USES = 16  # of the bytes of a file: tied tensors share them
_ALIGNMENT = 64  # bytes, torch's own
_ROOT = "archive"
_ZIP64_EXTRA = 20  # bytes that it adds to a local header
_DAMAGED = "it may be truncated or damaged, copy or download it again"


def scan(path: Path) -> TensorFile:
    """Find the bytes of every tensor of a file, in the order of its dict; tied tensors have the same ones.

    Raises:
        FormatError: it is not a whole file of plain tensors; all tensors that cannot be read are named.
    """
    return TensorFile(path, b"", tuple(entry for entry, _ in _places(path, views=False)), path.stat().st_size)


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, which is mapped into memory; nothing is allocated for bytes that it only claims.

    Raises:
        FormatError: as `scan`; or the tensors claim far more bytes than the file has.
    """
    places, size = _places(path, views=True), path.stat().st_size
    claimed = sum(tensor.nbytes for _, tensor in places)
    if claimed > _MOST_USES * size:
        raise FormatError(f"{path}: its tensors claim {claimed:,} bytes, the file has {size:,}; save them contiguous")
    mapped = torch.UntypedStorage.from_file(str(path), False, size)
    return {entry.name: _mapped(mapped, entry, tensor) for entry, tensor in places}


def _mapped(mapped: Any, entry: TensorEntry, tensor: pickled.PickledTensor) -> Tensor:
    dtype = DTYPES[entry.dtype]
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    data: Any = torch.empty(0, dtype=torch.uint8)
    data.set_(mapped[entry.start : entry.end], 0, (entry.end - entry.start,))
    if entry.start % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).as_strided(entry.shape, tensor.stride)


def _places(path: Path, views: bool) -> list[tuple[TensorEntry, pickled.PickledTensor]]:
    """Where each tensor is, and its record in the pickle.

    `views`: as `read` takes them: also tensors that are not contiguous, and files of torch before 1.6.
    """
    with path.open("rb") as file:
        is_bare = file.read(1) == b"\x80"
        if is_bare and not views:
            raise FormatError(
                f"{path}: is a bare pickle, as torch saved before 1.6, without a directory of its tensors; save it"
                " again with torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
            )
        try:
            return _bare_entries(path, file) if is_bare else _entries(path, file, views)
        except Exception as error:  # zipfile and pickle fail at a damaged file with any exception
            if isinstance(error, FormatError) or pickled.is_of_the_disk(error):
                raise
            reason = one_line(error, 200) or type(error).__name__
            raise FormatError(f"{path}: not a whole torch file ({reason}); {_DAMAGED}") from error


def _bare_entries(path: Path, file: BinaryIO) -> list[tuple[TensorEntry, pickled.PickledTensor]]:
    """The tensors in a file of torch before 1.6: four pickles, the last of which is the dict; a pickle of the keys of
    storages; then for each storage its count of numbers, and the numbers."""
    file.seek(0)
    if pickled.value(path, file) != _MAGIC:
        raise ValueError("it begins like a pickle that torch.save() did not write")
    for _ in ("the protocol", "the sizes of C's types"):
        pickled.value(path, file)
    table, keys = pickled.table(path, file, views=True), pickled.value(path, file)
    storages = {tensor.storage.key: tensor.storage for tensor in table.values()}
    starts, size = {}, path.stat().st_size
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        starts[key] = file.tell()
        if count != storages[key].size or starts[key] + storages[key].nbytes > size:
            raise ValueError(f"storage {key} is not whole")
        file.seek(storages[key].nbytes, 1)
    for name, tensor in table.items():
        if tensor.start + tensor.extent > tensor.storage.nbytes:
            raise ValueError(f"{name} does not fit into its storage")
    begins = {name: starts[tensor.storage.key] + tensor.start for name, tensor in table.items()}
    return [(TensorEntry(n, t.dtype, t.shape, begins[n], begins[n] + t.extent), t) for n, t in table.items()]


def tied(file: TensorFile) -> dict[str, str]:
    """Name of a tensor -> name of the first one that has the same bytes; the `aliases` of `write`."""
    first: dict[tuple[int, int], str] = {}
    pairs = {e.name: first.setdefault((e.start, e.end), e.name) for e in file.entries if e.end > e.start}
    return {name: owner for name, owner in pairs.items() if name != owner}


def _entries(path: Path, file: BinaryIO, views: bool) -> list[tuple[TensorEntry, pickled.PickledTensor]]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        root = _root(path, members)
        if len(members) < len(archive.infolist()):
            raise ValueError("it holds two members of one name")
        order = archive.read(_checked(path, members, f"{root}/byteorder")) if f"{root}/byteorder" in members else b""
        if order not in (b"little", b""):
            raise FormatError(f"{path}: byteorder: got {order.decode()!r}, wanted 'little'; save it on another machine")
        data = io.BytesIO(archive.read(_checked(path, members, f"{root}/data.pkl")))
        table = pickled.table(path, data, views)
        limits = [*sorted(info.header_offset for info in members.values()), archive.start_dir]
        return [(_entry(path, file, members, limits, root, name, tensor), tensor) for name, tensor in table.items()]


def _root(path: Path, members: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder that holds everything."""
    roots = [name.split("/")[0] for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise FormatError(f"{path}: is a zip file that torch.save() did not write, it has no data.pkl")
    if f"{roots[0]}/constants.pkl" in members:
        raise FormatError(
            f"{path}: is a TorchScript archive, which holds code; save the module's state_dict() with torch.save()"
        )
    return roots[0]


def _checked(path: Path, members: Mapping[str, zipfile.ZipInfo], name: str) -> zipfile.ZipInfo:
    """A member, checked to exist, uncompressed and not encrypted."""
    info = members.get(name)
    if info is None:
        raise FormatError(f"{path}: it lacks {name}, which its pickle names; {_DAMAGED}")
    if info.flag_bits & 1:
        raise FormatError(f"{path}: {name} is encrypted; decrypt the file first")
    if info.compress_type != zipfile.ZIP_STORED:
        raise FormatError(
            f"{path}: {name} is compressed, so that no tensor can be read alone; save it again with"
            " torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
        )
    return info


def _entry(
    path: Path,
    file: BinaryIO,
    members: Mapping[str, zipfile.ZipInfo],
    limits: Sequence[int],
    root: str,
    name: str,
    tensor: pickled.PickledTensor,
) -> TensorEntry:
    """A tensor's place, by the local header of its member; `limits`: where members begin and the last ends."""
    info = _checked(path, members, f"{root}/data/{tensor.storage.key}")
    file.seek(info.header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    own_name = file.read(name_length).decode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if signature != b"PK\x03\x04" or own_name != info.orig_filename:
        raise ValueError(f"{info.filename} is not where the archive's directory puts it")
    data_start = info.header_offset + 30 + name_length + extra_length
    if data_start + info.file_size > limits[bisect.bisect_right(limits, info.header_offset)]:
        raise ValueError(f"{info.filename} overlaps what follows it")
    if not tensor.start + tensor.extent <= tensor.storage.nbytes == info.file_size:
        raise ValueError(f"{name} does not fit into the {info.file_size} bytes of {info.filename}")
    start = data_start + tensor.start
    return TensorEntry(name, tensor.dtype, tensor.shape, start, start + tensor.extent)


def write(
    target: Path,
    layout: Layout,
    content: Callable[[str], Iterable[Piece]],
    advance: Callable[[int], None],
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Write the new file `target`, which `torch.load(target, weights_only=True, mmap=True)` reads. Equal contents make
    equal files.

    Args:
        target: Must not exist.
        layout: In the order of the dict; dtypes are keys of `tensors.DTYPES`.
        content: Yields the bytes of the tensor of that name in pieces; called once for each, in order.
        advance: Called with the number of bytes after each piece; the sum is the size of the file.
        aliases: Name of a tensor -> name of the tensor whose storage it shares; `content` is not called for it.
    """
    aliases = aliases or {}
    keys = {name: str(key) for key, name in enumerate(name for name, _, _ in layout if name not in aliases)}
    table = {name: pickled.whole(dtype, shape, keys[aliases.get(name, name)]) for name, dtype, shape in layout}
    for name, owner in aliases.items():
        assert table[name].storage == table[owner].storage, f"{name} cannot be a view of {owner}"
    data = pickled.dump(table)
    done = 0
    with target.open("xb") as file:

        def written() -> None:
            nonlocal done
            advance(file.tell() - done)
            done = file.tell()

        with zipfile.ZipFile(file, "w") as archive:
            _add(archive, file, "data.pkl", len(data), [data], written)
            _add(archive, file, "byteorder", 6, [b"little"], written)
            for name, key in keys.items():
                _add(archive, file, f"data/{key}", table[name].nbytes, content(name), written)
            _add(archive, file, "version", 2, [b"3\n"], written)
        written()


def _add(
    archive: zipfile.ZipFile,
    file: BinaryIO,
    name: str,
    size: int,
    pieces: Iterable[Piece],
    written: Callable[[], None],
) -> None:
    """Write one member, its data at a multiple of the alignment: an extra field of its header fills the gap."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    info.file_size = size
    is_large = size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule
    gap = -(file.tell() + 30 + len(info.filename) + 4 + is_large * _ZIP64_EXTRA) % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
    with archive.open(info, "w", force_zip64=is_large) as member:
        assert file.tell() % _ALIGNMENT == 0, f"{name} would start at {file.tell()}"
        for piece in pieces:
            member.write(piece)
            written()
    assert info.file_size == size, f"{name} has {info.file_size} bytes, not {size}"
    info.extra = b""  # the directory needs none
