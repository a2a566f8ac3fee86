"""`tables`: what docs/benchmarks.md shows of the rows, and whether it still shows them."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.cases import ROOT
from benchmarks.errors import BenchmarkError
from benchmarks.options import SPECS
from benchmarks.rows import RESULTS, Row, read
from benchmarks.tables import page, plots

PAGE, IMAGES, README = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images", ROOT / "README.md"
PAGES = {PAGE: page.SECTIONS, README: page.OF_README}


def write(
    check: bool, results: Path = RESULTS, pages: dict[Path, dict[str, page.Section]] = PAGES, images: Path = IMAGES
) -> int:
    """Rewrite the generated parts of the pages and draw the plots; the exit code.

    Args:
        check: Write nothing; 1 if a page differs from what the rows give. Plots are not compared.
        results: The folder of rows.
        pages: Each with its generated parts.
        images: The folder of plots.

    Raises:
        BenchmarkError: a page lacks a marker, or the results are broken.
    """
    rows: list[Row] = [row for name in SPECS for row in read(results / f"{name}.jsonl")]
    stale = False
    for target, sections in pages.items():
        if not target.exists():
            raise BenchmarkError(f"{target}: no such page; it holds the markers between which the tables go")
        text = target.read_text(encoding="utf-8")
        wanted = page.filled(text, rows, sections)
        if not check:
            target.write_text(wanted, encoding="utf-8")
        elif text != wanted:
            stale = True
            print(
                f"benchmarks: {target.name} is not what the rows give; run python -m benchmarks tables", file=sys.stderr
            )
    if not check:
        plots.draw(rows, images)
    return int(stale)
