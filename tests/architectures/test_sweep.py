"""Every architecture of the installed transformers, in eight parts: none is broken."""

import warnings

import pytest
import transformers

from architectures import architectures_page
from architectures.sweep import BROKEN, REFUSED, WORKS, sweep
from architectures.tiny import model_types

PARTS = 8


def test_the_page_is_what_the_rows_say_and_none_of_them_is_broken():
    rows = architectures_page.read()
    text = architectures_page.PAGE.read_text(encoding="utf-8")
    version = text.partition("from transformers ")[2].partition(", which")[0]  # the tests run with others, too
    assert text == architectures_page.page(rows, version)
    outcomes = [row.outcome for row in rows]
    assert outcomes.count(WORKS) > 200
    assert BROKEN not in outcomes


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_live_equals_merged_and_every_block_gets_a_gradient(part):
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the hosts
        rows = [sweep(model_type) for model_type in model_types()[part::PARTS]]
    assert [row for row in rows if row.outcome == BROKEN] == []
    assert sum(row.outcome in (WORKS, REFUSED) for row in rows) > len(rows) / 4
