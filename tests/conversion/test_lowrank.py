"""Factors of a delta: exact where the variant is a LoRA, and elsewhere the best that there are."""

import pytest
import torch

from flashbone import variants
from flashbone.errors import ConfigError, NonFiniteError
from flashbone.variants import lowrank
from helpers import reference
from helpers.blocks import SIZES, VARIANT_NAMES, random_block
from helpers.comparison import Promise, close, relative_error, same_bits

EXACT = ("bone", "mini")
SHAPES = [(12, 20), (20, 12), (9, 9), (1, 7)]


def _slowly_decaying(out: int, in_: int) -> torch.Tensor:
    U, S, V = torch.linalg.svd(torch.randn(out, in_, dtype=torch.float64), full_matrices=False)
    return (U * 0.7 ** torch.arange(len(S))) @ V


def _left_out(D: torch.Tensor, rank: int) -> float:
    S = torch.linalg.svdvals(D)
    return float(S[rank:].norm() / S.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", EXACT)
def test_the_factors_of_bone_and_mini_are_their_delta_bit_for_bit(name, size, dtype):
    out, in_, r = size
    block = random_block(name, out, in_, r, dtype=dtype)
    A, B = variants.get(name).factors(block, out, in_)
    assert (A.shape, B.shape, A.dtype, B.dtype) == ((r, in_), (out, r), dtype, dtype)
    assert same_bits(B @ A, variants.get(name).delta(torch.zeros(out, in_, dtype=dtype), block), Promise.EXACT)


@pytest.mark.parametrize("name", sorted(set(VARIANT_NAMES) - set(EXACT)))
def test_the_other_variants_have_no_factors_and_say_what_to_ask_for(name):
    block = random_block(name, 8, 12, 4)
    assert variants.get(name).factors(block, 8, 12) is None
    with pytest.raises(ConfigError, match=rf"{name} depends on the weight.*give the rank.*r here is 4.*or the error"):
        lowrank.factored(variants.get(name), block, (8, 12), lambda: torch.randn(8, 12), None, None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_best_factors_are_those_of_a_truncated_svd(shape, rank):
    D = torch.randn(*shape, dtype=torch.float64)
    found = lowrank.best(D, rank, None)
    U, S, V = torch.linalg.svd(D, full_matrices=False)
    assert close(found.B @ found.A, (U[:, :rank] * S[:rank]) @ V[:rank], torch.float32)
    assert found.used == len(found.A) == min(rank, *shape)
    assert abs(found.error - _left_out(D, rank)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("error", [0.5, 0.1, 0.01, 1e-5])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_an_error_is_met_by_the_stored_factors_and_by_no_smaller_rank(shape, error, dtype):
    D = _slowly_decaying(*shape).to(dtype)
    found = lowrank.best(D, None, error)
    stored = relative_error(found.B.double() @ found.A.double(), D)
    assert found.A.dtype == dtype
    assert float(stored) == pytest.approx(found.error, abs=1e-12)
    assert found.error <= error < _left_out(D.double(), found.used - 1)


def test_an_error_that_no_rank_meets_in_the_dtype_is_refused():
    with pytest.raises(ConfigError, match=r"1e-09.*float32 factors of full rank miss by"):
        lowrank.best(torch.randn(8, 8), None, 1e-9)


def test_an_error_that_a_rank_meets_exactly_is_met():
    found = lowrank.best(torch.diag(torch.tensor([4.0, 3.0], dtype=torch.float64)), None, 0.6)
    assert (found.used, found.error) == (1, 0.6)


def test_where_rounding_exceeds_the_error_one_rank_more_is_taken():
    D = _slowly_decaying(40, 40).float()
    spectrum, rounded = _left_out(D.double(), 30), lowrank.best(D, 30, None).error
    error = (spectrum + rounded) / 2
    assert spectrum < error < rounded
    found = lowrank.best(D, None, error)
    assert found.used == 31
    assert found.error <= error


def test_both_factors_are_of_one_magnitude():
    found = lowrank.best(_slowly_decaying(9, 7), 4, None)
    assert close(found.A.norm(dim=1), found.B.norm(dim=0))
    assert close(found.A.norm(dim=1), (0.7 ** torch.arange(4)).sqrt(), torch.float32)


def test_a_matrix_in_pieces_has_the_factors_of_the_whole(monkeypatch):
    D = torch.randn(5, 33, dtype=torch.float64)
    whole = lowrank.best(D, 2, None)
    monkeypatch.setattr(lowrank, "_CHUNK", 20)
    pieces = lowrank.best(D, 2, None)
    assert close(pieces.B @ pieces.A, whole.B @ whole.A)
    assert pieces.error == pytest.approx(whole.error, rel=1e-12)


@pytest.mark.parametrize(("rank", "error"), [(4, None), (None, 0.01)])
def test_an_untrained_adapter_needs_no_rank_at_all(rank, error):
    found = lowrank.best(torch.zeros(6, 8), rank, error)
    assert (found.used, found.error, found.A.shape, found.B.shape) == (0, 0.0, (0, 8), (6, 0))


@pytest.mark.parametrize("seed", range(20))
def test_a_rank_above_that_of_the_delta_is_not_used(seed):
    torch.manual_seed(seed)
    D = torch.randn(16, 2, dtype=torch.float64) @ torch.randn(2, 16, dtype=torch.float64)
    found = lowrank.best(D, 8, None)
    assert found.used == 2
    assert close(found.B @ found.A, D)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("rank", "error"), [(2, None), (None, 0.4)])
@pytest.mark.parametrize("size", [(8, 12, 4), (12, 7, 4), (3, 20, 4)])
def test_an_exact_variant_can_be_made_smaller(name, rank, error, size):
    out, in_, r = size
    block = random_block(name, out, in_, r, dtype=torch.float64)
    found = lowrank.factored(variants.get(name), block, (out, in_), lambda: pytest.fail("reads W"), rank, error, 2.0)
    D = 2 * variants.get(name).delta(torch.zeros(out, in_, dtype=torch.float64), block)
    assert not found.is_exact
    assert found.error == pytest.approx(_left_out(D, found.used), abs=1e-9)
    assert relative_error(found.B @ found.A, D) == pytest.approx(found.error, abs=1e-9)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_a_scale_multiplies_the_delta(name):
    block, W = random_block(name, 8, 12, 4), torch.randn(8, 12, dtype=torch.float64)
    rank = None if name in EXACT else 8
    found = lowrank.factored(variants.get(name), block, (8, 12), lambda: W, rank, None, scale=-0.3)
    assert close(found.B @ found.A, -0.3 * variants.get(name).delta(W, block), torch.float32)
    assert found.is_exact == (name in EXACT)


def test_a_scale_keeps_the_dtype_where_it_rounds_nothing():
    block = random_block("bone", 8, 12, 4, dtype=torch.bfloat16)
    for scale, dtype in ((1.0, torch.bfloat16), (-0.5, torch.bfloat16), (0.3, torch.float32)):
        found = lowrank.factored(variants.get("bone"), block, (8, 12), lambda: pytest.fail("reads W"), 4, None, scale)
        assert (found.A.dtype, found.B.dtype) == (torch.bfloat16, dtype)
        assert (found.is_exact, found.error, found.used) == (True, 0.0, 4)
        assert close(found.B.double(), scale * block.double().mT, torch.float32)
        assert same_bits(found.B.double(), scale * block.double().mT, Promise.EXACT) or scale == 0.3


@pytest.mark.parametrize("name", sorted(set(VARIANT_NAMES) - set(EXACT)))
@pytest.mark.parametrize(("of_weight", "of_block"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_a_delta_is_computed_in_the_wider_dtype(name, of_weight, of_block):
    W, block = torch.randn(8, 12).to(of_weight), random_block(name, 8, 12, 4, dtype=of_block)
    found = lowrank.factored(variants.get(name), block, (8, 12), lambda: W, 8, None)
    assert found.A.dtype == found.B.dtype == torch.float64
    assert relative_error(found.B @ found.A, reference.delta(name, W, block)) < 1e-9


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_a_broken_block_or_weight_is_refused(name):
    block = random_block(name, 8, 12, 4)
    W = torch.full((8, 12), torch.inf, dtype=torch.float64)
    if name not in EXACT:
        with pytest.raises(NonFiniteError, match="the delta holds NaN or infinity"):
            lowrank.factored(variants.get(name), block, (8, 12), lambda: W, 3, None)
    block.view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError, match="the block holds NaN or infinity"):
        lowrank.factored(variants.get(name), block, (8, 12), lambda: torch.zeros(8, 12), 3, None)


@pytest.mark.parametrize(
    ("rank", "error", "words"),
    [
        (4, 0.1, "got a rank and an error"),
        (0, None, "rank: got 0"),
        (True, None, "rank: got True"),
        (None, 1.0, "error: got 1.0"),
        (None, 1e-9, "error: got 1e-09"),
        (None, float("nan"), "error: got nan"),
    ],
)
def test_sizes_that_cannot_be_are_named(rank, error, words):
    with pytest.raises(ConfigError, match=words):
        lowrank.check_size(rank, error)


@pytest.mark.parametrize(("rank", "error"), [(None, None), (1, None), (None, lowrank.MIN_ERROR), (None, 0.99)])
def test_the_least_and_the_largest_sizes_can_be(rank, error):
    lowrank.check_size(rank, error)
    with pytest.raises(ConfigError, match="rank: got 0"):
        lowrank.check_size(0, error)
