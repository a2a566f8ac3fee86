"""Forward of one layer for one token: what an adapter costs in generation, beside the base and merged into it."""

from __future__ import annotations

from benchmarks.cases import Setting
from benchmarks.rows import Row
from benchmarks.run import Run

METHODS = ("bone", "mini", "bat-row", "bat-col", "lora", "miss", "bone-merged", "bone-unloaded")
MANY_ADAPTERS = 10


def measure(run: Run) -> list[Row]:
    """The rows of a part."""
    edge, r, calls = (32, 8, 2) if run.options.quick else (4096, 64, 50)
    names = run.options.pick(METHODS)
    settings = [Setting(name, r) for name in names]
    settings += [Setting(name, r, MANY_ADAPTERS) for name in names if name == "bone"]
    shape = {"tokens": 1, "in": edge, "out": edge}
    return run.measure(run.case("decode", shape, calls=calls), settings)
