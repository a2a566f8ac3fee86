"""Forward of a language model over 32 rows that belong to 8 adapters, beside the same rows with one adapter for all."""

from __future__ import annotations

from benchmarks.cases import Setting
from benchmarks.rows import Row
from benchmarks.run import Run

METHODS = ("bone", "mini", "bat-row", "bat-col", "orthogonal", "lora")
ADAPTERS = 8


def measure(run: Run) -> list[Row]:
    """The rows of a part: `prefill` has many tokens a row, `decode` one."""
    rows, seq, r = (8, 4, 8) if run.options.quick else (32, 16, 64)
    shape = {"model": run.model, "batch": rows, "seq": 1 if run.part == "decode" else seq}
    names = run.options.pick(METHODS)
    settings = [Setting(name, r, adapters) for name in names for adapters in (1, ADAPTERS)]
    return run.measure(run.case("mixed", shape), settings)
