"""A batch whose rows have adapters of their own: what the base sees, and whose output is overwritten."""

import pytest
import torch
from torch.nn.functional import linear

from flashbone import variants
from flashbone.ops.moves import Moves
from flashbone.ops.rows import Part, run_by_rows
from helpers import reference
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import close

OUT, IN = 11, 13
# (start, size, variant) of the parts of six rows
BATCHES = {
    "all rows": [(0, 2, "bone"), (2, 3, "bat-row"), (5, 1, "mini")],
    "gaps": [(1, 2, "bat-col"), (4, 1, "orthogonal")],
    "first and last": [(0, 1, "bat-col"), (5, 1, "bat-col")],
    "side by side": [(1, 2, "bat-col"), (3, 2, "bat-col")],
    "one for all": [(0, 6, "bat-col")],
    "none": [],
}


class Base:
    """A linear layer that notes the shapes it is called with, and what it returned."""

    def __init__(self):
        self.W, self.bias = torch.randn(OUT, IN, dtype=torch.float64) / 4, torch.randn(OUT, dtype=torch.float64)
        self.shapes, self.outputs, self.copies = [], [], []

    def __call__(self, x):
        self.shapes.append(tuple(x.shape))
        self.outputs.append(linear(x, self.W, self.bias))
        self.copies.append(self.outputs[-1].clone())
        return self.outputs[-1]

    def weight(self):
        return self.W, self.bias

    def was_overwritten(self) -> bool:
        return any(not torch.equal(a, b) for a, b in zip(self.outputs, self.copies, strict=True))


def run(shape: tuple[int, ...], batch: str, is_plain: bool, refetch: bool = False):
    base, x = Base(), torch.randn(6, *shape, IN, dtype=torch.float64)
    parts, want = [], linear(x, base.W, base.bias)
    for start, size, name in BATCHES[batch]:
        block, rows = random_block(name, OUT, IN, 4), x[start : start + size]
        moves = Moves(rows)
        variants.get(name).move(moves, rows, block, 0.7)
        parts.append(Part(start, size, moves))
        want[start : start + size] = reference.forward(rows, base.W, base.bias, [(name, block, 0.7)])
    got = run_by_rows(x, parts, base, base.weight, is_plain, refetch)
    assert got.shape == want.shape
    assert close(got, want)
    return base


@pytest.mark.parametrize("refetch", [True, False])
@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_row_has_its_own_adapter(batch, shape, is_plain, refetch):
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            base = run(shape, batch, is_plain, refetch)
        tokens = torch.Size(shape).numel()
        alone = sum(size for _, size, name in BATCHES[batch] if name == "bat-col" and is_plain and not refetch)
        if not is_plain:
            assert base.shapes == [(6, *shape, IN)]  # as it would be called without adapters
        else:
            assert base.shapes == ([((6 - alone) * tokens, IN)] if alone < 6 else [])  # rows that need it, as tokens


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
@pytest.mark.parametrize("batch", ["all rows", "gaps"])
def test_the_output_of_a_base_is_overwritten_in_inference_only_and_only_of_a_plain_one(batch, shape):
    with torch.no_grad():
        assert not run(shape, batch, is_plain=False).was_overwritten()
        assert run(shape, "all rows", is_plain=True).was_overwritten()
    assert not run(shape, batch, is_plain=True).was_overwritten()


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_a_base_that_is_not_plain_gets_the_dtype_of_the_input_under_autocast(name):
    seen, x, W = [], torch.randn(4, 2, IN), torch.randn(OUT, IN)
    moves = Moves(x[1:3])
    variants.get(name).move(moves, x[1:3], random_block(name, OUT, IN, 4, dtype=torch.float32), 1.0)

    def base(x):
        seen.append(x.dtype)
        return linear(x, W)

    with torch.autocast("cpu", torch.bfloat16):
        run_by_rows(x, [Part(1, 2, moves)], base, lambda: (W, None), is_plain_base=False)
    assert seen == [torch.float32]
