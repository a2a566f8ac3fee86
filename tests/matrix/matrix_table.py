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

Every operation below is carried out on every kind of base layer, in every variant (bone, mini, bat-col, bat-row,
orthogonal) and in several dtypes, and its result is compared with the formula. This page is generated from those tests
(`python tests/matrix/matrix_table.py`).

A cell with **yes** in the row `merge` and the column `Linear` is the tests `test_matrix[merge-Linear-...]` of
tests/matrix/test_matrix.py, one for each variant and dtype: `pytest tests/matrix -k merge-Linear` runs them. A number
is the reason why it cannot be, below; the test of that name asserts then that the operation fails with an error that
says so.

"""


def page() -> str:
    """The whole page."""
    reasons: list[str] = []
    lines = [f"| operation | {' | '.join(host.name for host in HOSTS)} |", "| --- " * (len(HOSTS) + 1) + "|"]
    for name in OPERATIONS:
        lines.append(f"| `{name}` | {' | '.join(_cell(host, name, reasons) for host in HOSTS)} |")
    what = ["| operation | what it is |", "| --- | --- |"]
    what += [f"| `{name}` | {_what(name)} |" for name in OPERATIONS]
    dtypes = ["| layer | dtypes | what it is |", "| --- | --- | --- |"]
    dtypes += [
        f"| {host.name} | {', '.join(str(dtype).removeprefix('torch.') for dtype in host.dtypes)} | {host.what} |"
        for host in HOSTS
    ]
    numbered = [f"{i}. {reason[:1].upper()}{reason[1:]}." for i, reason in enumerate(reasons, 1)]
    parts = ["\n".join(lines), "## Why not", "\n".join(numbered), "## The operations", "\n".join(what)]
    return HEAD + "\n\n".join([*parts, "## The layers", "\n".join(dtypes)]) + "\n"


def _what(name: str) -> str:
    doc = OPERATIONS[name].__doc__
    assert doc is not None
    return doc.strip().splitlines()[0]


def _cell(host: Host, operation: str, reasons: list[str]) -> str:
    """yes; or for which variants not, each with the number of the reason."""
    refused: dict[str, list[str]] = {}
    for variant in VARIANT_NAMES:
        if (refusal := host.refusal(operation, variant)) is not None:
            refused.setdefault(_number(refusal, reasons), []).append(variant)
    if not refused:
        return "yes"
    if sum(map(len, refused.values())) == len(VARIANT_NAMES):
        return ", ".join(sorted(refused, key=int))
    return "yes, not " + ", ".join(f"{', '.join(names)} ({number})" for number, names in refused.items())


def _number(refusal: Refusal, reasons: list[str]) -> str:
    if refusal.why not in reasons:
        reasons.append(refusal.why)
    return str(reasons.index(refusal.why) + 1)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
