"""The formats of adapters: how each is recognised, read and written; `flashbone.files` has one file for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashbone.conversion import cards
from flashbone.errors import ConfigError
from flashbone.files import gguf, lora, miss, peft, reading, rwkv
from flashbone.files.adapter import Adapter
from flashbone.files.lora import Lora


@dataclass(frozen=True)
class Format:
    """A format of adapters.

    Attributes:
        name: as users write it.
        holds: what it is read into and written from.
        read: from a path; None: it is only written.
        write: to an empty folder, or to a new file where the format is one file.
        suffix: of that file; None: the format is a folder.
    """

    name: str
    holds: type[Adapter] | type[Lora]
    read: Callable[[Path], Adapter | Lora] | None
    write: Callable
    suffix: str | None = None


FORMATS = {
    f.name: f
    for f in (
        Format("peft", Adapter, peft.read, peft.write),
        Format("miss", Adapter, miss.read, miss.write),
        Format("lora", Lora, lora.read, lora.write),
        Format("rwkv-peft", Adapter, rwkv.read_adapter, rwkv.write, ".pth"),
        Format("gguf", Lora, None, gguf.write, ".gguf"),
    )
}


def get(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"to: got {name!r}, wanted one of {', '.join(FORMATS)}")
    return FORMATS[name]


def recognise(path: Path) -> Format:
    """The format of what lies there, by the configuration of a folder, and by the suffix of a file.

    Raises:
        FormatError: nothing lies there, or it is of no format that is read.
    """
    return FORMATS[reading.recognise(path)[0]]


def read(path: Path) -> tuple[Format, Adapter | Lora]:
    """Read an adapter of any format.

    Raises:
        FormatError: it is missing, broken, or of no format that is read.
    """
    name, path = reading.recognise(path)
    found = FORMATS[name]
    assert found.read is not None, "what is recognised can be read"
    return found, found.read(path)


def size(held: Adapter | Lora) -> int:
    """Bytes of all tensors."""
    tensors = [*held.replacements.values()]
    if isinstance(held, Lora):
        tensors += [t for pair in held.factors.values() for t in pair]
    else:
        tensors += held.blocks.values()
    return sum(t.nbytes for t in tensors)


def _card(target: Format, held: Adapter | Lora) -> cards.Card:
    if isinstance(held, Lora):
        plain = not held.embeddings and not held.replacements
        return cards.Card(
            target.name,
            None,
            (held.rank,),
            tuple(held.factors),
            held.base_model,
            linear_only=plain,
            is_rwkv=cards.are_own_rwkv([*held.factors, *held.replacements]),
        )
    sizes = sorted({block.shape[-2] for block in held.blocks.values()})
    single = bool(held.config.get("parameters_to_save"))
    is_linear = not held.transposed and not held.parameters
    return cards.Card(
        target.name,
        held.variant.name,
        tuple(sizes),
        tuple(held.blocks),
        held.base_model,
        linear_only=is_linear and not single,
        fits_lora=not held.parameters and not single,
        fits_rwkv=is_linear and cards.are_rwkv([*held.blocks, *held.replacements]),
        is_rwkv=cards.are_own_rwkv([*held.blocks, *held.replacements]),
    )


def write(target: Format, held: Adapter | Lora, place: Path, is_file: bool) -> tuple[str, ...]:
    """Write into an empty folder, or the new file `place`; the names of what was written."""
    if target.suffix is None:
        target.write(held, place)
    else:
        target.write(held, place if is_file else place / f"adapter{target.suffix}")
    if not is_file:
        (place / "README.md").write_text(cards.page(_card(target, held)), encoding="utf-8")
    return () if is_file else tuple(sorted(p.name for p in place.iterdir()))
