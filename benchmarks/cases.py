"""What is measured: a case (the work and its size) and the settings of methods that are compared on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / ".cache" / "demo" / "smollm2"


@dataclass(frozen=True)
class Setting:
    """One method with its sizes.

    Attributes:
        method: A name of `benchmarks.methods.METHODS`.
        r: Block size. LoRA and DoRA run with rank r/2: on square layers that is as many parameters.
        adapters: How many adapters are active at once.
    """

    method: str
    r: int = 64
    adapters: int = 1

    @property
    def label(self) -> str:
        """Its name in requests, progress lines and errors."""
        return f"{self.method} r={self.r} x{self.adapters}"


FROZEN = Setting("frozen", r=0, adapters=0)


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        kind: A name of `benchmarks.subjects.SUBJECTS`.
        shape: Its size: tokens, in and out of a layer; or model, batch and seq (tokens a row) of a model.
        dtype: "float32" or "bfloat16", of the base and the input.
        device: "cpu" or "cuda".
        calls: Calls in one timed repetition; times are per call.
        scratch: A folder for files of the case, such as saved adapters.
    """

    kind: str
    shape: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    device: str = "cpu"
    calls: int = 1
    scratch: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a request to a worker."""
        return asdict(self)
