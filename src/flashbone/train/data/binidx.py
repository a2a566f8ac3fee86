"""Tokenised documents in a `.bin`/`.idx` pair, as Megatron and RWKV-LM have them: read as a memory map.

    .idx  MMIDIDX\\0\\0, version u64 = 1, dtype code u8, sequences u64, entries of the document index u64,
          sizes int32[sequences], pointers int64[sequences] (bytes into .bin), document index int64[entries]
    .bin  the token ids of all sequences; document i is the sequences from entry i of the document index to entry i + 1

All numbers are little-endian. (Megatron-LM, `megatron/core/datasets/indexed_dataset.py`; RWKV-LM, `src/binidx.py`)
"""

import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flashbone.errors import FormatError

log = logging.getLogger(__name__)

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floats; which is which differs between Megatron and RWKV-LM.
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
BLOCK = 2**20  # sequences checked at a time


def pair(path: str | Path) -> tuple[Path, Path]:
    """The `.idx` and the `.bin` that `path` means: either of them, or what they are called without the ending."""
    stem = str(path)
    stem = stem[:-4] if stem.endswith((".bin", ".idx")) else stem
    return Path(stem + ".idx"), Path(stem + ".bin")


def is_binidx(path: Path) -> bool:
    """Whether `path` means such a pair; a name without the ending counts if no file or folder has it."""
    return path.suffix in (".bin", ".idx") or (not path.exists() and any(part.is_file() for part in pair(path)))


class BinIdx:
    """The documents of a pair, each an array of token ids; nothing is in memory but what is looked at.

    Raises:
        FormatError: the files are missing, cut short, of another kind, or do not belong together.
    """

    def __init__(self, path: str | Path):
        self.index, self.data = pair(path)
        for part, other in ((self.index, self.data), (self.data, self.index)):
            if not part.is_file():
                raise FormatError(f"{part}: no such file, wanted beside {other}; put both into one folder")
        self.dtype, sequences, entries = self._header()
        raw = _mapped(self.index)
        ends = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * entries])
        self.sizes = raw[ends[0] : ends[1]].view("<i4")
        self.pointers = raw[ends[1] : ends[2]].view("<i8")
        self._bytes = _mapped(self.data)
        self._check_sequences()
        self.documents = self._documents(raw[ends[2] : ends[3]].view("<i8"))

    def __len__(self) -> int:
        return len(self.documents) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> np.ndarray:
        """The token ids of one document: a view of the file where it is one sequence."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        first, last = self.documents[number : number + 2]
        parts = [self._sequence(i) for i in range(first, last)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def _sequence(self, number: int) -> np.ndarray:
        start = int(self.pointers[number])
        return self._bytes[start : start + int(self.sizes[number]) * self.dtype.itemsize].view(self.dtype)

    def _header(self) -> tuple[np.dtype, int, int]:
        with self.index.open("rb") as file:
            start = file.read(HEADER.size)
        held = self.index.stat().st_size
        if start[: len(MAGIC)] != MAGIC[: len(start)]:
            raise FormatError(f"{self.index}: starts with {start[:9]!r}, {MAGIC!r} was wanted; is it another file?")
        if len(start) < HEADER.size:
            raise FormatError(f"{self.index}: {_cut(held, HEADER.size)} for its header; copy it again")
        _, version, code, sequences, entries = HEADER.unpack(start)
        if version != 1:
            raise FormatError(f"{self.index}: version {version}, 1 was wanted; write it with a Megatron or RWKV tool")
        if code not in DTYPES:
            raise FormatError(
                f"{self.index}: dtype code {code} is not of integers, wanted one of {', '.join(map(str, DTYPES))}; "
                "write the token ids as uint16 (8) or int32 (4)"
            )
        size = HEADER.size + 12 * sequences + 8 * entries
        if held != size:
            counts = f"{sequences} sequences and {entries} entries of the document index"
            raise FormatError(f"{self.index}: {_cut(held, size)} for {counts}; copy it again")
        if not sequences:
            raise FormatError(f"{self.index}: no sequences, one or more were wanted; was the writing broken off?")
        return DTYPES[code], sequences, entries

    def _check_sequences(self) -> None:
        held = len(self._bytes)
        for start in range(0, len(self.sizes), BLOCK):
            sizes = self.sizes[start : start + BLOCK].astype(np.int64) * self.dtype.itemsize
            pointers = self.pointers[start : start + BLOCK]
            bad = np.flatnonzero((sizes < 0) | (pointers < 0) | (pointers > held - sizes))
            if len(bad):
                first, size = int(pointers[bad[0]]), int(sizes[bad[0]])
                raise FormatError(
                    f"{self.data}: holds {held} bytes, but sequence {start + bad[0]} of {self.index.name} is {size} "
                    f"bytes from byte {first} on; one of the two was cut short or is of other data, copy both again"
                )

    def _documents(self, entries: np.ndarray) -> np.ndarray:
        """Where documents begin and end; every sequence is one where the index names none, as old tools left it."""
        count = len(self.sizes)
        if len(entries) == 0 or (len(entries) == 1 and entries[0] == 0):
            log.info("data: %s has no document index: each of its %d sequences is a document", self.index, count)
            return np.arange(count + 1)
        falling = np.flatnonzero(entries[1:] < entries[:-1])
        if entries[0] != 0 or entries[-1] != count or len(falling):
            got = f"{entries[falling[0] + 1]} after {entries[falling[0]]}" if len(falling) else ""
            got = got or f"entries from {entries[0]} to {entries[-1]}"
            raise FormatError(
                f"{self.index}: the document index has {got}, ascending ones from 0 to the {count} sequences "
                "were wanted; write it again"
            )
        return entries


def _mapped(path: Path) -> np.ndarray:
    return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.empty(0, np.uint8)


def _cut(held: int, wanted: int) -> str:
    return f"holds {held} bytes, {wanted} were wanted"
