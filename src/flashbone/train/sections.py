"""Sections of a recipe that mean something only where they are given: few bits for the base, and RWKV's own."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flashbone.errors import ConfigError


@dataclass
class Quantization:
    """The base in few bits, by bitsandbytes; the adapter stays in fp32 ("QBone").

    Raises:
        ConfigError: these do not go together.
    """

    bits: int = 4  # or 8
    type: str | None = None  # of 4 bits: nf4 (the default) or fp4
    double: bool = False  # of 4 bits: quantise the scales, too

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or isinstance(self.bits, bool):
            raise ConfigError(f"quantization.bits: got {self.bits!r}, wanted 4 or 8")
        if self.type not in (None, "nf4", "fp4"):
            raise ConfigError(f"quantization.type: got {self.type!r}, wanted nf4 or fp4")
        if not isinstance(self.double, bool):
            raise ConfigError(f"quantization.double: got {self.double!r}, wanted true or false")
        if self.bits == 8 and (self.type is not None or self.double):
            raise ConfigError("quantization: type and double are for 4 bits; leave them out, or set bits: 4")


PARTS = ("ln", "time")  # RWKV-PEFT's names


@dataclass
class RwkvSettings:
    """What only RWKV models have.

    Raises:
        ConfigError: a value is out of range.
    """

    vocabulary: str | None = None  # file of the tokenizer of a .pth model; that of the package rwkv when not given
    chunk_ctx: int | None = None  # train sequences in pieces of so many tokens, which hand the state on
    carry_gradient: bool = True  # with chunk_ctx: through the state to earlier pieces, too
    l2_wrap: bool = False  # keep the largest logits small, as RWKV's own training does
    train_parts: list[str] = field(default_factory=list)  # along with the adapter: ln (LayerNorms), time (time_* of v6)
    time_decay_lr: float = 2.0  # with time: the learning rate of time_decay, as a multiple of the others'

    def __post_init__(self) -> None:
        def is_number(value: Any, kinds: type | tuple[type, ...]) -> bool:
            return isinstance(value, kinds) and not isinstance(value, bool) and value > 0

        wrong = [part for part in self.train_parts if part not in PARTS] if isinstance(self.train_parts, list) else None
        checks = {
            f"vocabulary: got {self.vocabulary!r}, wanted a file": isinstance(self.vocabulary, str | None),
            f"chunk_ctx: got {self.chunk_ctx!r}, wanted a number of tokens": self.chunk_ctx is None
            or is_number(self.chunk_ctx, int),
            f"carry_gradient: got {self.carry_gradient!r}, wanted true or false": isinstance(self.carry_gradient, bool),
            f"l2_wrap: got {self.l2_wrap!r}, wanted true or false": isinstance(self.l2_wrap, bool),
            f"train_parts: got {self.train_parts!r}, wanted a list of {' and '.join(PARTS)}": wrong == [],
            f"time_decay_lr: got {self.time_decay_lr!r}, wanted a positive number": is_number(
                self.time_decay_lr, (int, float)
            ),
        }
        if problems := [message for message, is_right in checks.items() if not is_right]:
            raise ConfigError("; ".join(f"rwkv.{problem}" for problem in problems))


Section = TypeVar("Section")


def section(kind: type[Section], name: str, given: dict[str, Any]) -> Section | None:
    """A section of a configuration as the dataclass that it means; None where it is empty.

    Raises:
        ConfigError: it makes no sense.
    """
    try:
        return kind(**given) if given else None
    except TypeError:
        names = ", ".join(item.name for item in dataclasses.fields(kind))  # pyright: ignore[reportArgumentType]
        raise ConfigError(f"{name}: got {given}, wanted {names}") from None
