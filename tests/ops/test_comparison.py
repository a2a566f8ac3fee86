"""Each tolerance fails on a wrong answer: blocks swapped, a sign flipped, a transposed block."""

import pytest
import torch

from helpers import reference
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import TOLERANCES, close


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_wrong_answers_fail_at_every_tolerance(name, dtype):
    out, in_, r = 66, 130, 16
    W, x = torch.randn(out, in_, dtype=torch.float64) / in_**0.5, torch.randn(5, in_, dtype=torch.float64)
    block = random_block(name, out, in_, r, std=0.05)
    want = reference.forward(x, W, None, [(name, block, 1.0)])
    wrong = {
        "sign flipped": -block,
        "first axis rolled": block.roll(1, 0),
        "last axis rolled": block.roll(1, -1),
        "scaled by 0.9": 0.9 * block,
    }
    for block in wrong.values():
        assert not close(reference.forward(x, W, None, [(name, block, 1.0)]), want, dtype)
    assert close(want.to(dtype), want)


def test_nan_and_wrong_shapes_fail():
    ones = torch.ones(3)
    assert not close(torch.full((3,), torch.nan), ones)
    assert not close(ones, torch.full((3,), torch.nan))
    assert not close(torch.ones(4), ones)
    assert not close(torch.ones(1, 3), ones)


def test_the_oracle_knows_no_other_variant():
    with pytest.raises(AssertionError, match="no reference for another"):
        reference.delta("another", torch.ones(2, 2), torch.ones(2, 2))
