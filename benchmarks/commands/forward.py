"""Forward of an encoder, as in classification: what a small adapter costs beside the base and merged into it."""

from __future__ import annotations

from benchmarks.cases import Setting
from benchmarks.rows import Row
from benchmarks.run import Run

METHODS = ("orthogonal", "oft", "lora", "bone", "miss", "orthogonal-merged", "orthogonal-unloaded")


def measure(run: Run) -> list[Row]:
    """The rows of a part: BERT-base with its attention outputs adapted."""
    model, batch, seq, r = ("bert-tiny", 2, 8, 8) if run.options.quick else ("bert-base", 8, 128, 64)
    case = run.case("forward", {"model": model, "batch": batch, "seq": seq})
    return run.measure(case, [Setting(name, r) for name in run.options.pick(METHODS)])
