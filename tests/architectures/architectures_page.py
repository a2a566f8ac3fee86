"""Writes docs/architectures.md: python tests/architectures/architectures_page.py"""

import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers

import flashbone  # noqa: F401
from architectures.sweep import BROKEN, REFUSED, WORKS, Row, sweep
from architectures.tiny import model_types

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def page(rows: list[Row]) -> str:
    count = Counter(row.outcome for row in rows)
    run = [row for row in rows if row.outcome in (WORKS, REFUSED, BROKEN)]
    table = [
        f"| `{row.model_type}` | {row.outcome} | {row.layers} | {row.read or ''} | {row.unused or ''} | {row.detail} |"
        for row in run
    ]
    version, others = transformers.__version__, len(rows) - len(run)
    return (
        f"""# Architectures

Each architecture of transformers {version} that runs at a tiny size, by one rule that shrinks its default
config, with random weights and adapters on every linear layer and convolution: the output with live adapters equals
that after a merge, and each block of a layer whose own weight gets a gradient gets one. This page is written by
`python tests/architectures/architectures_page.py`; `pytest tests/architectures` runs the same.

Of {len(rows)} architectures {len(run)} ran: {count[WORKS]} work, {count[REFUSED]} refuse a layer, {count[BROKEN]}
are broken. For {others} others the rule built no tiny model or had no input, which says nothing
about their adapters.

*read*: layers whose weight a host reads. *unused*: layers that this input does not reach.

| architecture | outcome | layers | read | unused | why |
| --- | --- | --- | --- | --- | --- |
"""
        + "\n".join(table)
        + "\n"
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    PAGE.write_text(page([sweep(model_type) for model_type in model_types()]), encoding="utf-8")
