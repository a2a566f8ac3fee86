"""Forward of one layer for one token: what an adapter costs in generation, beside the base and merged into it."""

from __future__ import annotations

from benchmarks.cases import Setting
from benchmarks.rows import Row
from benchmarks.run import Run

METHODS = ("bone", "mini", "bat-row", "bat-col", "lora", "miss", "bone-merged", "bone-unloaded")
OF_SMALL = ("bone", "mini", "bat-row", "bat-col", "orthogonal", "lora", "miss")
MANY_ADAPTERS = 10
# Part -> in and out, r, and calls of a repetition. Of a small layer nearly all of a call is Python.
SIZES = {"main": (4096, 64, 50), "middle": (2048, 64, 200), "small": (64, 16, 2000)}


def measure(run: Run) -> list[Row]:
    """The rows of a part."""
    edge, r, calls = (32, 8, 2) if run.options.quick else SIZES[run.part]
    names = run.options.pick(OF_SMALL if run.part == "small" else METHODS)
    settings = [Setting(name, r) for name in names]
    if run.part == "main":
        settings += [Setting(name, r, MANY_ADAPTERS) for name in names if name == "bone"]
    shape = {"tokens": 1, "in": edge, "out": edge}
    return run.measure(run.case("decode", shape, calls=calls), settings)
