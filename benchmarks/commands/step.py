"""A whole training step of a language model, all linear layers adapted."""

from __future__ import annotations

from benchmarks.cases import Setting
from benchmarks.methods import TRAINED
from benchmarks.rows import Row
from benchmarks.run import Run

# Fewer methods, so that those of the targets stand closer to each other in time, and more rounds fit.
OF_TARGETS = ("bone", "bat-row", "bat-col", "lora", "miss", "miss-bat")


def batch_of(dtype: str) -> int:
    """Rows of a batch."""
    return 2 if dtype == "float32" else 4


def measure(run: Run) -> list[Row]:
    """The rows of a part."""
    r, seq = (16, 16) if run.options.quick else (64, 256)
    names = run.options.pick(OF_TARGETS if run.part == "targets" else [name for name in TRAINED if name != "frozen"])
    case = run.case("step", {"model": run.model, "batch": batch_of(run.dtype), "seq": seq})
    return run.measure(case, [Setting(name, r) for name in names])
