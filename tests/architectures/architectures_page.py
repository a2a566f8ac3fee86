"""Writes tests/architectures/rows.csv and docs/architectures.md: python tests/architectures/architectures_page.py"""

import csv
import dataclasses
import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers

import flashbone  # noqa: F401
from architectures.sweep import BROKEN, REFUSED, WORKS, Row, sweep
from architectures.tiny import model_types

PAGE, ROWS = Path(__file__).parents[2] / "docs" / "architectures.md", Path(__file__).with_name("rows.csv")


def read() -> list[Row]:
    """The rows of the last sweep."""
    with ROWS.open(encoding="utf-8", newline="") as file:
        return [
            Row(row["model_type"], row["outcome"], *(int(row[n]) for n in ("layers", "read", "unused")), row["detail"])
            for row in csv.DictReader(file)
        ]


def write(rows: list[Row]) -> None:
    """All rows into the data file, and what needs words onto the page."""
    with ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    PAGE.write_text(page(rows), encoding="utf-8")


def page(rows: list[Row], version: str = transformers.__version__) -> str:
    """The counts, and what the reader of the page has to know of single architectures."""
    count = Counter(row.outcome for row in rows)
    run = [row for row in rows if row.outcome in (WORKS, REFUSED, BROKEN)]
    failed = [row for row in run if row.outcome != WORKS]
    failures = "\n".join(f"- `{row.model_type}`: {row.outcome}; {row.detail}" for row in failed)
    read = ", ".join(f"`{row.model_type}` {row.read}" for row in run if row.read)
    return f"""# Architectures

**{count[WORKS]} of the {len(run)} architectures that ran work.** {count[REFUSED]} refuse a layer, {count[BROKEN]} are
broken. They come from transformers {version}, which has {len(rows)}; for the other
{len(rows) - len(run)} our rule made no tiny model or had no input for it, so they were not tested.
[All rows](../tests/architectures/rows.csv): find your `model_type` there.
{chr(10) + failures + chr(10) if failures else ""}
Each model is tiny and random, with adapters on every linear layer and convolution except the output embeddings.
Two things are checked: live and merged outputs agree, and every block gets a gradient if its layer's weight gets one.

Some models read a layer's weight without calling the layer. Adapters work there, too, but each read computes a shifted
weight, which costs time. Such layers, by architecture: {read}.

`python tests/architectures/architectures_page.py` sweeps again and writes this page.
"""


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    write([sweep(model_type) for model_type in model_types()])
