"""A .bin/.idx pair written as its format describes, without code of flashbone."""

import struct
from pathlib import Path

CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "H": 8}  # struct's letter -> the format's code


def write_binidx(path: Path, sequences, documents=None, letter="H", **header) -> Path:
    """Write each sequence as a document, or `documents` as the index of documents; `header` overrides its fields."""
    sequences = [list(ids) for ids in sequences]
    documents = range(len(sequences) + 1) if documents is None else documents
    width = struct.calcsize(letter)
    data = b"".join(struct.pack(f"<{len(ids)}{letter}", *ids) for ids in sequences)
    sizes = header.pop("sizes", [len(ids) for ids in sequences])
    starts = [sum(len(ids) for ids in sequences[:i]) * width for i in range(len(sequences))]
    fields = {"magic": b"MMIDIDX\x00\x00", "version": 1, "code": CODES[letter], "n": len(sequences), **header}
    index = fields["magic"] + struct.pack("<QBQQ", fields["version"], fields["code"], fields["n"], len(documents))
    index += struct.pack(f"<{len(sizes)}i", *sizes)
    index += struct.pack(f"<{len(starts)}q", *header.get("pointers", starts))
    index += struct.pack(f"<{len(documents)}q", *documents)
    Path(f"{path}.bin").write_bytes(data)
    Path(f"{path}.idx").write_bytes(index)
    return path
