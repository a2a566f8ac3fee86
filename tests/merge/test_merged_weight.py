"""`merged_weight` and `undo` some rows at a time: the oracle, any order, any chunk, in place and in other dtypes."""

import itertools

import pytest
import torch

from flashbone import variants
from flashbone.errors import FlashboneError, NonFiniteError
from flashbone.variants import merged
from flashbone.variants.merged import check_undoable, merged_weight, row_chunks, undo
from flashbone.variants.stacked import PerExpert
from helpers import reference
from helpers.blocks import CASES, VARIANT_NAMES, random_block
from helpers.comparison import Promise, close, same_bits


@pytest.fixture(params=[1, 40, 1 << 19])
def chunk(request, monkeypatch):
    """The smallest chunks there are, a few rows, and all at once."""
    monkeypatch.setattr(merged, "CHUNK", request.param)
    return request.param


def _term(name: str, out: int, in_: int, r: int, scale: float, dtype=torch.float32) -> tuple:
    return variants.get(name), random_block(name, out, in_, r, dtype=dtype), scale


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_chunks_of_rows_give_the_oracle_and_are_taken_back(chunk, name, size):
    W = torch.randn(*size[:2], dtype=torch.float64)
    term = _term(name, *size, 0.7, torch.float64)
    got = merged_weight(W, [term])
    assert close(got, W + 0.7 * reference.delta(name, W, term[1]))
    assert close(undo(got, [term]), W, torch.float32)
    if size[:2] == (8, 12) and chunk < 96:
        assert len(list(row_chunks(W, [term]))) > 1


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(VARIANT_NAMES, 2)])
def test_each_of_two_adapters_refers_to_the_pristine_weight(chunk, first, second):
    W = torch.randn(11, 13, dtype=torch.float64)
    terms = [_term(first, 11, 13, 4, 0.7, torch.float64), _term(second, 11, 13, 3, -1.5, torch.float64)]
    want = W + sum(scale * reference.delta(variant.name, W, block) for variant, block, scale in terms)
    assert close(merged_weight(W, terms), want)
    assert close(merged_weight(W, terms, must_be_finite=True), want)
    assert same_bits(merged_weight(W, terms[::-1]), merged_weight(W, terms), Promise.SAME_PRODUCT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_order_of_adapters_changes_a_bit(chunk, dtype):
    W = torch.randn(11, 13).to(dtype)
    terms = [_term(name, 11, 13, 3 + i, 0.3 + i) for i, name in enumerate(VARIANT_NAMES)]
    terms += [_term("bone", 11, 13, 4, 1.0), _term("bone", 11, 13, 4, 1.0)]
    want = merged_weight(W, terms)
    assert close(want.double(), W.double() + sum(s * reference.delta(v.name, W, b) for v, b, s in terms), dtype)
    for order in itertools.islice(itertools.permutations(terms), 0, 5040, 97):
        assert same_bits(merged_weight(W, order), want, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_a_narrow_block_is_merged_in_the_dtype_of_a_wide_weight(name):
    W, (variant, block, scale) = torch.randn(11, 13, dtype=torch.float64), _term(name, 11, 13, 4, 0.7)
    assert close(merged_weight(W, [(variant, block, scale)]), W + 0.7 * reference.delta(name, W, block))


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_the_layout_of_the_weight_does_not_change_a_bit(chunk, name):
    W, term = torch.randn(11, 13), _term(name, 11, 13, 4, 1.0)
    want = merged_weight(W, [term])
    assert same_bits(merged_weight(W.mT.contiguous().mT, [term]), want, Promise.SAME_PRODUCT)
    assert same_bits(merged_weight(torch.zeros(144)[1:].view(11, 13).copy_(W), [term]), want, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_a_merge_in_place_or_into_another_dtype_is_rounded_once(chunk, name):
    W, term = torch.randn(11, 13).bfloat16(), _term(name, 11, 13, 4, 1.0)
    wide = merged_weight(W, [term], result=torch.empty(11, 13))
    assert same_bits(wide, merged_weight(W.float(), [term]), Promise.SAME_PRODUCT)
    assert same_bits(merged_weight(W, [term], result=W), wide.bfloat16(), Promise.SAME_PRODUCT)
    assert same_bits(W, wide.bfloat16(), Promise.SAME_PRODUCT)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_experts_are_merged_and_taken_back_one_by_one(chunk, name):
    W = torch.randn(3, 11, 13)
    blocks = torch.stack([random_block(name, 11, 13, 4, dtype=torch.float32) for _ in W])
    term = PerExpert(variants.get(name), 3), blocks, 0.5
    got = merged_weight(W, [term])
    for e, W_e in enumerate(W):
        assert same_bits(got[e], merged_weight(W_e, [(variants.get(name), blocks[e], 0.5)]), Promise.SAME_PRODUCT)
        assert close(got[e], W_e + 0.5 * reference.delta(name, W_e, blocks[e]), torch.float32)
    assert (undo(got, [term]) - W).norm() < 1e-4 * W.norm()


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_adapters_are_taken_out_in_the_dtype_that_is_asked_for_and_where_it_is_asked_for(chunk, name):
    merged_to_it, term = torch.randn(11, 13), _term(name, 11, 13, 4, 0.7)
    result = torch.empty(11, 13, dtype=torch.float64)
    assert undo(merged_to_it, [term], result, torch.float64) is result
    Q = torch.eye(4).double() + term[0].solved(term[1])[1] if name == "orthogonal" else None  # it was solved in fp32
    assert close(result + 0.7 * reference.delta(name, result, term[1], Q), merged_to_it.double())
    want = undo(merged_to_it, [term])
    assert want.dtype == torch.float32
    assert undo(merged_to_it, [term], merged_to_it) is merged_to_it
    assert same_bits(merged_to_it, want, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("size", [1.0, 1e6])
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_whether_a_merge_can_be_taken_back_does_not_depend_on_the_size_of_the_weight(name, size):
    W, (variant, block, scale) = size * torch.randn(11, 13), _term(name, 11, 13, 4, 1.0)
    if not variant.delta_depends_on_weight:
        block *= size
    got = merged_weight(W, [(variant, block, scale)])
    check_undoable(W, got, [(variant, block, scale)])
    with pytest.raises(FlashboneError, match="without the original weight this merge could not be undone"):
        check_undoable(W, got + 1e-3 * got.abs().max(), [(variant, block, scale)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_a_merge_may_be_lost_and_damage_may_not(dtype):
    W, term = torch.randn(11, 13).to(dtype), _term("bone", 11, 13, 4, 1.0)
    merged = merged_weight(W, [term])
    assert not torch.equal(undo(merged, [term]), W)
    check_undoable(W, merged, [term])
    with pytest.raises(FlashboneError, match="could not be undone"):
        check_undoable(W, (merged.float() + 0.1 * torch.randn(11, 13)).to(dtype), [term])


def test_a_zero_weight_can_always_be_taken_back():
    term = _term("bat-col", 11, 13, 4, 1.0)
    merged = merged_weight(torch.zeros(11, 13), [term])
    check_undoable(torch.zeros(11, 13), merged, [term])  # raises where it cannot
    assert merged.abs().max() > 0


def test_bad_values_are_counted_over_all_chunks(chunk):
    block = random_block("bone", 11, 13, 4, dtype=torch.float32)
    block[1, [0, 10]] = torch.nan
    with pytest.raises(NonFiniteError, match=r"here: .* 6 values that are NaN"):
        merged_weight(torch.randn(11, 13), [(variants.get("bone"), block, 1.0)], "here", must_be_finite=True)
    assert merged_weight(torch.randn(11, 13), [(variants.get("bone"), block, 1.0)]).isnan().sum() == 6  # if not asked
