"""Every architecture of the installed transformers, in eight parts: none is broken."""

import re
import warnings
from pathlib import Path

import pytest
import transformers

from architectures.sweep import BROKEN, REFUSED, WORKS, sweep
from architectures.tiny import model_types

PARTS = 8
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def test_the_page_lists_over_two_hundred_architectures_that_work():
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `[^`]+` \| works \|", text, re.M)
    assert len(rows) > 200
    assert f"| {BROKEN} |" not in text


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_live_equals_merged_and_every_block_gets_a_gradient(part):
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the hosts
        rows = [sweep(model_type) for model_type in model_types()[part::PARTS]]
    assert [row for row in rows if row.outcome == BROKEN] == []
    assert sum(row.outcome in (WORKS, REFUSED) for row in rows) > len(rows) / 4
