"""The reshapes: views where the sizes allow it, zeros where they do not, and their own inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flashbone import shards
from flashbone.errors import ShapeError
from helpers.comparison import Promise, same_bits


@settings(deadline=None)
@given(size=st.integers(1, 40), r=st.integers(1, 50))
def test_join_inverts_split_and_shard_sum_adds_up(size, r):
    x = torch.arange(2 * size, dtype=torch.float64).view(2, size) + 1
    parts = shards.split(x, r)
    assert parts.shape == (2, shards.count(size, r), r)
    assert same_bits(shards.join(parts, size), x, Promise.EXACT)
    assert same_bits(shards.shard_sum(x, r), parts.sum(-2), Promise.EXACT)
    assert parts.sum() == x.sum()


@settings(deadline=None)
@given(out=st.integers(1, 20), in_=st.integers(1, 20), r=st.integers(1, 24))
def test_blocks_of_a_weight_are_where_the_formula_says(out, in_, r):
    W = torch.randn(out, in_)
    blocks = shards.split_weight(W, r)
    assert same_bits(shards.join_weight(blocks, out, in_), W, Promise.EXACT)
    a, i, b, j = (out - 1) // r, (out - 1) % r, (in_ - 1) // r, (in_ - 1) % r
    assert blocks[a, i, b, j] == W[-1, -1]
    assert blocks.count_nonzero() == W.count_nonzero()


@settings(deadline=None)
@given(size=st.integers(1, 30), k=st.integers(1, 40))
def test_tile_repeats_and_crops(size, k):
    t, y = torch.randint(-9999, 9999, (2, k)).float(), torch.randint(-9999, 9999, (2, size)).float()
    want = t[:, torch.arange(size) % k]
    assert same_bits(shards.tile(t, size), want, Promise.EXACT)
    assert same_bits(shards.add_tiled(y, t), y + want, Promise.EXACT)


def test_divisible_sizes_give_views():
    x, W = torch.randn(3, 12), torch.randn(8, 12)
    assert shards.split(x, 4).data_ptr() == x.data_ptr()
    assert shards.split_weight(W, 4).data_ptr() == W.data_ptr()
    whole, tail = shards.full_and_tail(x[:, :11], 4)
    assert whole.data_ptr() == x.data_ptr()
    assert tail.data_ptr() == x[:, 8:].data_ptr()


class Copies(TorchDispatchMode):
    """Notes each tensor that an operator other than an addition makes in memory of its own."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not out._is_view() and func.overloadpacket is not torch.ops.aten.add:
            self.names.append(str(func))
        return out


def test_tiles_that_fit_are_added_without_being_made():
    y, t = torch.randn(3, 12), torch.randn(3, 4)
    with torch.no_grad(), Copies() as copies:
        shards.add_tiled(y, t)
    assert not [name for name in copies.names if "clone" in name]
    with torch.no_grad(), Copies() as copies:
        shards.add_tiled(y[:, :11], t)
    assert [name for name in copies.names if "clone" in name]


@pytest.mark.parametrize(("size", "r"), [(0, 4), (4, 0), (4, -1)])
def test_sizes_must_be_positive(size, r):
    with pytest.raises(ShapeError, match="both must be positive"):
        shards.count(size, r)
