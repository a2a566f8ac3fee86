"""What moves compute with: dtypes under autocast, sums that stay in the range of fp16, blocks times their scales."""

import pytest
import torch

from flashbone import shards
from flashbone.ops.bone import add_factored, bounded_sum
from flashbone.ops.inputs import compute_dtype, flat, overflow_unit, scaled
from helpers.comparison import Promise, close, same_bits

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def test_the_unit_of_a_sum_is_the_least_power_of_two_of_at_least_its_shards_in_fp16_and_one_elsewhere():
    for size, r, unit in ((4, 4, 1), (5, 4, 2), (8, 4, 2), (9, 4, 4), (16, 4, 4), (17, 4, 8), (4096, 1, 4096)):
        assert overflow_unit(torch.zeros(2, size, dtype=torch.float16), r) == unit
        assert overflow_unit(torch.zeros(2, size, dtype=torch.bfloat16), r) == 1
        with torch.autocast("cpu", torch.float16):
            assert overflow_unit(torch.zeros(2, size), r) == unit


@pytest.mark.parametrize("in_", [4096, 4097])
def test_a_sum_beyond_the_range_of_fp16_is_divided_before_it_is_rounded(in_):
    x = torch.full((2, in_), 100.0, dtype=torch.float16)
    unit = overflow_unit(x, 4)
    got = bounded_sum(x, 4, unit)
    assert got.dtype == torch.float16
    assert torch.isinf(shards.shard_sum(x, 4).half()).all()
    assert close(got.double() * unit, shards.shard_sum(x.double(), 4), torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_comes_in_the_dtype_of_its_input_divided_by_what_is_asked_for(dtype):
    x = torch.randn(3, 13).to(dtype)
    for divisor in (1, 2, 8):
        got = bounded_sum(x, 4, divisor)
        assert got.dtype == dtype
        assert close(got, shards.shard_sum(x.double(), 4) / divisor, dtype)


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_one_row_is_added_in_inference_as_several_are(dtype):
    y, s, B = (torch.randn(shape).to(dtype) for shape in ((1, 5), (1, 4), (4, 5)))
    want = y.double() + s.double() @ B.double()
    with torch.no_grad():
        assert add_factored(y, s, B, in_place=True) is y
    assert close(y, want, dtype)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtypes", [(a, b, c) for a in FLOATS[:3] for b in FLOATS[:3] for c in FLOATS[:3]], ids=str)
def test_factors_are_added_in_the_dtype_of_the_output_whatever_theirs_are(dtypes, in_place):
    y, s, B = (torch.randn(shape).to(dtype) for shape, dtype in zip(((3, 5), (3, 4), (4, 5)), dtypes, strict=True))
    want = y.double() + s.to(y.dtype).double() @ B.to(y.dtype).double()
    got = add_factored(y, s, B, in_place)
    assert got.dtype == y.dtype
    assert close(got, want)
    assert (got is y) == in_place


def test_inputs_are_rows_of_tokens_and_a_block_with_scale_one_is_itself():
    x, block = torch.randn(2, 3, 4), torch.randn(3, 5)
    assert flat(x).shape == (6, 4)
    assert flat(x[0]).data_ptr() == x.data_ptr()
    assert flat(x[0, 0]).shape == (1, 4)
    assert scaled(block, 1.0) is block
    assert same_bits(scaled(block, -0.5), block * -0.5, Promise.EXACT)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_dtype_of_a_call_is_the_one_that_a_linear_layer_has_there(dtype):
    x = torch.randn(2, 3).to(dtype)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert compute_dtype(x) == torch.nn.functional.linear(x, x).dtype
    assert compute_dtype(torch.empty(2, 3, dtype=dtype, device="meta")) == dtype  # a device without autocast
