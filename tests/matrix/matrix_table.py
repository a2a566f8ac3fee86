"""docs/support.md from the matrix: `python tests/matrix/matrix_table.py` writes it, and a test compares it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

from matrix_hosts import HOSTS, Host, Refusal  # noqa: E402
from matrix_operations import OPERATIONS  # noqa: E402

from helpers.blocks import VARIANT_NAMES  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
HEAD = """# What works on which layer

Tests run every operation on every kind of layer, in every variant and several dtypes, and compare the result with the
formula. This page is generated from them (`python tests/matrix/matrix_table.py`); `pytest tests/matrix -k
merge-Linear` runs the cell `merge`, `Linear`.

**yes** means all variants; a list of variants means these alone. A number gives the reason for the others, below: they
fail with an error that says so. Operations with equal cells share a row; tests/matrix/matrix_operations.py says what
each does.

"""


def page() -> str:
    """The whole page."""
    reasons: list[str] = []
    lines = [f"| operations | {' | '.join(host.name for host in HOSTS)} |", "| --- " * (len(HOSTS) + 1) + "|"]
    rows: dict[str, list[str]] = {}  # the operations by their cells
    for name in OPERATIONS:
        rows.setdefault(" | ".join(_cell(host, name, reasons) for host in HOSTS), []).append(f"`{name}`")
    lines += [f"| {', '.join(names)} | {cells} |" for cells, names in rows.items()]
    dtypes = ["| layer | dtypes | what it is |", "| --- | --- | --- |"]
    dtypes += [
        f"| {host.name} | {', '.join(str(dtype).removeprefix('torch.') for dtype in host.dtypes)} | {host.what} |"
        for host in HOSTS
    ]
    numbered = [f"{i}. {reason[:1].upper()}{reason[1:]}." for i, reason in enumerate(reasons, 1)]
    parts = ["\n".join(lines), "## Why not", "\n".join(numbered), "## The layers", "\n".join(dtypes)]
    return HEAD + "\n\n".join(parts) + "\n"


def _cell(host: Host, operation: str, reasons: list[str]) -> str:
    """yes; or the variants that work, with the numbers of the reasons why others do not."""
    refused: dict[str, list[str]] = {}
    for variant in VARIANT_NAMES:
        if (refusal := host.refusal(operation, variant)) is not None:
            refused.setdefault(_number(refusal, reasons), []).append(variant)
    if not refused:
        return "yes"
    left = [name for name in VARIANT_NAMES if host.refusal(operation, name) is None]
    without = [name for name in VARIANT_NAMES if name not in left]
    words = f"not {', '.join(without)}" if len(without) < len(left) else ", ".join(left)
    return f"{words} ({', '.join(sorted(refused, key=int))})".strip()


def _number(refusal: Refusal, reasons: list[str]) -> str:
    if refusal.why not in reasons:
        reasons.append(refusal.why)
    return str(reasons.index(refusal.why) + 1)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
