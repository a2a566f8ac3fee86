"""What variants say about themselves, and which blocks from files fit a layer."""

import pytest
import torch

from flashbone import variants
from flashbone.errors import ShapeError
from flashbone.ops.moves import Moves
from flashbone.variants.stacked import PerExpert
from helpers import reference
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import close

ALL = [*map(variants.get, VARIANT_NAMES), variants.get("orthogonal", use_orthogonal=False)]


@pytest.mark.parametrize("variant", ALL, ids=repr)
def test_a_delta_is_linear_in_its_block_where_the_variant_says_so(variant):
    W, block = torch.randn(8, 12, dtype=torch.float64), random_block(variant.name, 8, 12, 4)
    is_linear = torch.allclose(variant.delta(W, 2 * block), 2 * variant.delta(W, block), rtol=1e-12, atol=1e-12)
    assert variant.is_linear == is_linear == PerExpert(variant, 3).is_linear


@pytest.mark.parametrize("variant", ALL, ids=repr)
def test_a_delta_depends_on_the_weight_where_the_variant_says_so(variant):
    W, block = torch.randn(8, 12, dtype=torch.float64), random_block(variant.name, 8, 12, 4)
    depends = not torch.equal(variant.delta(W, block), variant.delta(2 * W, block))
    assert variant.delta_depends_on_weight == depends == PerExpert(variant, 3).delta_depends_on_weight


@pytest.mark.parametrize("variant", ALL, ids=repr)
def test_a_move_reads_the_weight_where_the_variant_says_so(variant):
    x, block = torch.randn(2, 12, dtype=torch.float64), random_block(variant.name, 8, 12, 4)
    W, read = torch.randn(8, 12, dtype=torch.float64), []
    moves = Moves(x)
    variant.move(moves, x, block, 1.0)
    moves.run(lambda x: x @ W.T, lambda: read.append(1) or (W, None))
    assert variant.reads_weight == bool(read) == PerExpert(variant, 3).reads_weight


@pytest.mark.parametrize("r", [4, 3, 5, 16])
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_a_block_fits_its_own_layer_and_none_of_one_shard_more(name, r):
    out, in_, mini_r, variant = 17, 19, 6, variants.get(name)
    axes = {"bone": (r, 17), "mini": (r, 6), "bat-col": (-(-17 // r), r, r), "bat-row": (-(-19 // r), r, r)}
    shape = axes.get(name, (r, r))
    assert variant.block_shape(out, in_, r, mini_r) == shape
    assert variants.dimensions(variant) == len(shape)
    assert variants.check_block("here", variant, torch.zeros(shape), out, in_) is None
    if name not in ("mini", "orthogonal"):  # whose blocks know no layer
        with pytest.raises(ShapeError, match=f"here: a {name} block of shape"):
            variants.check_block("here", variant, torch.zeros(shape), out + r, in_ + r)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_blocks_of_other_layers_with_other_axes_or_without_numbers_are_refused(name):
    variant = variants.get(name)
    good = variant.block_shape(8, 12, 4, 3)
    # A block of bone or mini without rows would fit by the formula of its shape.
    for shape in [good[1:], (1, *good), (0, *good[1:]), (*good[:-1], 0), (0,) * len(good), ()]:
        with pytest.raises(ShapeError, match=r"here: a .* does not fit a layer with 8 output and 12 input"):
            variants.check_block("here", variant, torch.zeros(shape), 8, 12)


def test_a_random_start_is_that_of_peft():
    block = variants.random_block_(torch.empty(64, 256))
    assert 0.99 / 16 < block.abs().max() <= 1 / 16  # uniform up to 1 / sqrt(columns)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_each_expert_has_the_delta_of_its_own_block_and_none_moves_by_itself(name):
    inner = variants.get(name)
    stacked = PerExpert(inner, 3)
    assert stacked.block_shape(8, 12, 4, 2) == (3, *inner.block_shape(8, 12, 4, 2))
    W = torch.randn(3, 8, 12, dtype=torch.float64)
    block = torch.stack([random_block(name, 8, 12, 4) for _ in range(3)])
    want = torch.stack([reference.delta(name, *pair) for pair in zip(W, block, strict=True)])
    assert close(stacked.delta(W, block), want)
    assert (stacked.name, stacked.reads_weight) == (inner.name, inner.reads_weight)
    with pytest.raises(NotImplementedError, match="rows of x belong to one expert each"):
        stacked.move(Moves(W[0]), W[0], block, 1.0)
