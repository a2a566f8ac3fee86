"""Peak memory of a few training steps, each method in a process of its own; growth with tokens, r and adapters."""

from __future__ import annotations

import importlib.util

from benchmarks.cases import Setting
from benchmarks.commands.layer import GROWING
from benchmarks.commands.step import batch_of
from benchmarks.methods import CURRENT, METHODS, TRAINED
from benchmarks.rounds import Plan
from benchmarks.rows import Row
from benchmarks.run import Run

# AdamW's state exists after the first step, so the peak is that of the second.
STEPS = 2
BATCHES = (1, 2, 4)
BATCH_OF_GROWTH = 1
ADAPTERS = (1, 4, 10)
SEQ = 256
LIVE = (*GROWING, "miss-bat")


def measure(run: Run) -> list[Row]:
    """The rows of a part."""
    sizes, r = ((4, 8, 16), 16) if run.options.quick else ((16, 64, 128), 64)
    growing = run.options.pick(GROWING)
    if run.part == "main":
        names = run.options.pick([name for name in TRAINED if name != "frozen"])
        return _peak(run, batch_of(run.dtype), [Setting(name, r) for name in names])
    if run.part == "live":
        return _peak(run, batch_of(run.dtype), [Setting(name, r) for name in run.options.pick(LIVE)], "live_memory")
    if run.part == "alive":
        return _alive(run, r)
    if run.part == "tokens":
        settings = [Setting(name, r) for name in growing]
        return [row for batch in BATCHES for row in _peak(run, batch, settings)]
    if run.part == "r":
        return _peak(run, BATCH_OF_GROWTH, [Setting(name, size) for size in sizes for name in growing])
    settings = [Setting(n, r, count) for n in growing for count in (ADAPTERS if METHODS[n].several else ADAPTERS[:1])]
    return _peak(run, BATCH_OF_GROWTH, settings)


def _alive(run: Run, r: int) -> list[Row]:
    """What backward keeps, counted: nothing varies, so once."""
    names = run.options.pick([name for name in TRAINED if METHODS[name].worker == CURRENT and name != "frozen"])
    settings = [Setting(name, r) for name in names]
    whole, small = {"batch": batch_of(run.dtype), "seq": SEQ}, {"batch": 1, "seq": 64}
    sizes = {"plain": whole, "checkpointing": whole}
    if importlib.util.find_spec("bitsandbytes"):
        sizes["4-bit"] = small  # computed, while the others are counted on paper
    cases = [run.case("alive", {"model": run.model, **size, "base": base}) for base, size in sizes.items()]
    return [row for case in cases for row in run.measure(case, settings, plan=Plan(1, 0))]


def _peak(run: Run, batch: int, settings: list[Setting], kind: str = "memory") -> list[Row]:
    seq = 16 if run.options.quick else SEQ
    case = run.case(kind, {"model": run.model, "batch": batch, "seq": seq}, calls=STEPS)
    return run.measure(case, settings, own_process=True)
