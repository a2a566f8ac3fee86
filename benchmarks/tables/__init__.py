"""`tables`: what docs/benchmarks.md shows of the rows, and whether it still shows them."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.cases import ROOT
from benchmarks.errors import BenchmarkError
from benchmarks.options import SPECS
from benchmarks.rows import RESULTS, Row, read
from benchmarks.tables import page, plots

PAGE, IMAGES = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images"


def write(check: bool, results: Path = RESULTS, target: Path = PAGE, images: Path = IMAGES) -> int:
    """Rewrite the generated parts of the page and draw its plots; the exit code.

    Args:
        check: Write nothing; 1 if the page differs from what the rows give. Plots are not compared.

    Raises:
        BenchmarkError: the page lacks a marker, or the results are broken.
    """
    rows: list[Row] = [row for name in SPECS for row in read(results / f"{name}.jsonl")]
    if not target.exists():
        raise BenchmarkError(f"{target}: no such page; it holds the markers between which the tables go")
    text = target.read_text(encoding="utf-8")
    wanted = page.filled(text, rows)
    if check:
        if text != wanted:
            print(
                f"benchmarks: {target.name} is not what the rows give; run python -m benchmarks tables", file=sys.stderr
            )
        return int(text != wanted)
    plots.draw(rows, images)
    target.write_text(wanted, encoding="utf-8")
    return 0
