"""What a GGUF file says before its tensors: read with bounds, since transformers believes it."""

import struct
from pathlib import Path
from typing import BinaryIO

from flashbone.errors import FormatError, visible
from flashbone.files import claims

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_MOST_AXES = 8


def check(file: Path) -> None:
    """Refuse a GGUF file whose head does not fit into it, or that claims layers that it has not.

    Raises:
        FormatError: it is such a file.
    """
    try:
        with file.open("rb") as content:
            fields, names = _Reader(content, file.stat().st_size).head()
    except (struct.error, ValueError, KeyError) as error:
        raise FormatError(
            f"{file}: is damaged, or no GGUF file ({visible(error)}); copy or download it again"
        ) from None
    claims.check(file, {name.rpartition(".")[2].replace("block_count", "num_layers"): n for name, n in fields.items()})
    name = f"{fields.get('general.architecture')}.block_count"
    claimed, held = fields.get(name), len({n.split(".")[1] for n in names if n.startswith("blk.")})
    if held and not (isinstance(claimed, int) and claimed <= held):
        raise FormatError(f"{file}: {visible(name)}: got {claimed}, but it has {held} blocks; is it damaged?")


class _Reader:
    """Reads from a file of so many bytes, none of which it holds."""

    def __init__(self, content: BinaryIO, size: int) -> None:
        self._content, self._size = content, size

    def head(self) -> tuple[dict[str, object], list[str]]:
        """The fields but for lists, and the names of the tensors."""
        if self._content.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        _, tensors, count = self._number("I"), self._number("Q"), self._number("Q")
        fields = {self._text(): self._value(self._number("I")) for _ in range(self._fitting(count, 13))}
        names = []
        for _ in range(self._fitting(tensors, 24)):
            names.append(self._text())
            axes = self._number("I")
            if axes > _MOST_AXES:
                raise ValueError(f"a tensor of {axes} axes")
            self._skip(8 * axes + 12)
        return fields, names

    def _number(self, kind: str) -> int:
        return struct.unpack(f"<{kind}", self._content.read(struct.calcsize(f"<{kind}")))[0]

    def _fitting(self, count: int, each: int) -> int:
        """A count of things of at least so many bytes, which the rest of the file can hold."""
        if count * each > self._size - self._content.tell():
            raise ValueError(f"it claims {count:,} entries")
        return count

    def _text(self) -> str:
        return self._content.read(self._fitting(self._number("Q"), 1)).decode("utf-8", "replace")

    def _skip(self, count: int) -> None:
        self._content.seek(self._fitting(count, 1), 1)

    def _value(self, kind: int) -> object:
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            return self._number(_SCALARS[kind])
        inner, count = self._number("I"), self._number("Q")
        if inner == _TEXT:
            for _ in range(self._fitting(count, 8)):
                self._skip(self._number("Q"))
        else:
            self._skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        return None
