"""The lifecycle matrix: every operation on every kind of layer, variant and dtype; docs/support.md is its table.

What is not supported has its error asserted, with the words that the table gives as the reason.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from matrix_case import Case
from matrix_hosts import HOSTS, Host
from matrix_operations import OPERATIONS
from matrix_table import PAGE, page

from helpers.blocks import VARIANT_NAMES


def marks(host: Host, dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    """fp32 is of the first tier; the other dtypes run the same code."""
    if host.package:
        return [pytest.mark.beside]
    return [] if dtype == torch.float32 else [pytest.mark.slow]


CELLS = [
    pytest.param(
        operation,
        host,
        variant,
        dtype,
        id=f"{operation}-{host.name}-{variant}-{str(dtype)[6:]}",
        marks=marks(host, dtype),
    )
    for operation in OPERATIONS
    for host in HOSTS
    for variant in VARIANT_NAMES
    for dtype in host.dtypes
]


@pytest.mark.parametrize(("operation", "host", "variant", "dtype"), CELLS)
def test_matrix(operation: str, host: Host, variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if host.package and find_spec(host.package) is None:
        pytest.skip(f"{host.package} is not installed; `make test-all` brings it")
    case = Case(host, variant, dtype, tmp_path)
    refusal = host.refusal(operation, variant)
    if refusal is None:
        OPERATIONS[operation](case)
        return
    with pytest.raises(Exception, match=refusal.match):
        OPERATIONS[operation](case)


def test_the_page_on_support_is_that_of_the_matrix():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python tests/matrix/matrix_table.py`"
