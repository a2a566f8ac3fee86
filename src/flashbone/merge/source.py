"""Reading a file tensor by tensor, and hashing it on the way."""

import hashlib
from collections.abc import Iterator

from torch import Tensor

from flashbone.errors import FormatError
from flashbone.files import tensors
from flashbone.files.base import BaseModel

PIECE = 1 << 20  # bytes


class Reader:
    """Reads a file and takes its sha256; each byte is read once if tensors are asked for in the order of the file."""

    def __init__(self, file: tensors.TensorFile) -> None:
        self._file, self._io = file, file.path.open("rb")
        self._hash, self._hashed = hashlib.sha256(), 0

    def tensor(self, entry: tensors.Entry) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            FormatError: the file ends early.
        """
        self._hash_up_to(entry.start)
        self._io.seek(entry.start)
        tensor = tensors.read(self._io, entry)
        self._saw(entry.start, tensors.as_bytes(tensor))
        return tensor

    def pieces(self, entry: tensors.Entry) -> Iterator[bytes]:
        """The tensor's bytes.

        Raises:
            FormatError: the file ends early.
        """
        self._hash_up_to(entry.start)
        for start in range(entry.start, entry.end, PIECE):
            piece = self._read(start, min(start + PIECE, entry.end))
            self._saw(start, piece)
            yield piece

    def sha256(self) -> str:
        """Of the whole file; what was not read yet is read now."""
        self._hash_up_to(self._file.size)
        return self._hash.hexdigest()

    def close(self) -> None:
        self._io.close()

    def _hash_up_to(self, start: int) -> None:
        while self._hashed < start:
            self._saw(self._hashed, self._read(self._hashed, min(self._hashed + PIECE, start)))

    def _saw(self, start: int, data: bytes | memoryview) -> None:
        new = memoryview(data)[max(self._hashed - start, 0) :]
        self._hash.update(new)
        self._hashed += len(new)

    def _read(self, start: int, end: int) -> bytes:
        self._io.seek(start)
        data = self._io.read(end - start)
        if len(data) < end - start:
            raise FormatError(f"{self._file.path}: ended early; was it changed meanwhile?")
        return data


def sha256_of(tensor: Tensor) -> str:
    """Of the bytes of a contiguous tensor."""
    return hashlib.sha256(tensors.as_bytes(tensor)).hexdigest()


def read_one(model: BaseModel, name: str) -> Tensor:
    """A tensor of a model, by itself."""
    file = next(f for f in model.files if any(entry.name == name for entry in f.entries))
    with file.path.open("rb") as stream:
        stream.seek(model.entries[name].start)
        return tensors.read(stream, model.entries[name])
