"""RWKV's time mixing: how many times as long the loop over tokens takes as chunks, and what both keep for backward."""

from __future__ import annotations

from benchmarks.cases import Setting
from benchmarks.rows import Row
from benchmarks.run import Run

VERSIONS = (7, 6)
WIDTHS = ((1, 12, 64), (4, 4, 64), (1, 2, 32))  # batch, heads, features of a head
TOKENS = (128, 512, 2048)
CHUNKED = Setting("wkv-chunked", r=0, adapters=0)
LOOP = Setting("wkv-loop", r=0, adapters=0)


def measure(run: Run) -> list[Row]:
    """The rows of a part: `forward`, or `training`, which is forward and backward."""
    widths, lengths = (((1, 2, 8),), (8, 40)) if run.options.quick else (WIDTHS, TOKENS)
    shapes = [
        {"version": version, "batch": batch, "heads": heads, "size": size, "tokens": tokens}
        for version in VERSIONS
        for batch, heads, size in widths
        for tokens in lengths
    ]
    settings = [LOOP] if run.options.pick(["wkv-loop"]) else []
    # Several calls in a row, as layers make them: the first one alone pays for memory that the others find.
    fewest = 1 if run.options.quick else 3
    cases = [run.case(f"wkv_{run.part}", shape, calls=max(fewest, max(lengths) // shape["tokens"])) for shape in shapes]
    return [row for case in cases for row in run.measure(case, settings, floor=CHUNKED)]
