"""bat-col on a weight that is gathered or dequantised to be read: fetched again in backward, never kept."""

import pytest
import torch

from flashbone import variants
from flashbone.ops.bat_col import bat_col_linear, bat_col_linear_refetched
from flashbone.ops.cache import Kept
from flashbone.ops.moves import Moves
from helpers import reference
from helpers.blocks import SIZES, random_block
from helpers.comparison import Promise, close, same_bits


class Fetch:
    """Returns a new copy of W each time, and counts."""

    def __init__(self, W: torch.Tensor) -> None:
        self.W, self.count = W, 0

    def __call__(self) -> torch.Tensor:
        self.count += 1
        return self.W.clone()


def tensors(size, dtype=torch.float64, block_dtype=None):
    out, in_, r = size
    x, W, bias = (torch.randn(shape, dtype=dtype) for shape in ((3, in_), (out, in_), (out,)))
    blocks = [random_block("bat-col", out, in_, n, dtype=block_dtype or dtype).requires_grad_() for n in (r, r + 1)]
    return x.requires_grad_(), W / in_**0.5, bias.requires_grad_(), blocks


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("composite", [True, False])
def test_output_equals_the_oracle_and_gradients_pass_gradcheck(size, with_base, composite):
    x, W, bias, blocks = tensors(size)

    def run(x, bias, *blocks):
        return bat_col_linear_refetched(x, lambda: W.clone(), bias, blocks, with_base, composite)

    want = reference.forward(x, W, bias, [("bat-col", D, 1.0) for D in blocks])
    assert close(run(x, bias, *blocks), want if with_base else want - x @ W.T)
    assert torch.autograd.gradcheck(run, (x, bias, *blocks))


def test_second_derivatives_exist():
    x, W, bias, blocks = tensors((5, 6, 3))
    assert torch.autograd.gradgradcheck(
        lambda x, bias, *blocks: bat_col_linear_refetched(x, lambda: W.clone(), bias, blocks), (x, bias, *blocks)
    )


def test_torch_func_transforms_the_composite():
    _, W, bias, blocks = tensors((5, 6, 3))
    several = torch.randn(4, 3, 6, dtype=torch.float64)

    def run(x):
        return bat_col_linear_refetched(x, lambda: W, bias, blocks, composite=True)

    assert close(torch.func.vmap(run)(several), torch.stack([run(x) for x in several]))

    def through_moves(x):
        moves = Moves(x)
        variants.get("bat-col").move(moves, x, blocks[0], 1.0)
        base = torch.nn.functional.linear
        return moves.run(lambda base_x: base(base_x, W, bias), lambda: (W, bias), refetch=True)

    assert close(torch.func.vmap(through_moves)(several), torch.stack([through_moves(x) for x in several]))


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
def test_it_equals_the_ordinary_operator_and_each_gradient_has_its_own_dtype(bias_dtype):
    x, W, bias, blocks = tensors((11, 13, 4), torch.bfloat16, block_dtype=torch.float32)
    bias = None if bias_dtype is None else bias.detach().to(bias_dtype).requires_grad_()
    leaves = [leaf for leaf in (x, bias, *blocks) if leaf is not None]
    got = bat_col_linear_refetched(x, lambda: W.clone(), bias, blocks)
    want = bat_col_linear(x, W, bias, [D.to(W.dtype) for D in blocks])
    assert got.dtype == torch.bfloat16
    assert same_bits(got, want, Promise.SAME_PRODUCT)
    weights = torch.randn_like(got)
    for leaf, g, w in zip(leaves, *(torch.autograd.grad(y, leaves, weights) for y in (got, want)), strict=True):
        assert g.dtype == leaf.dtype
        assert same_bits(g, w, Promise.SAME_PRODUCT)


def test_nothing_as_large_as_the_weight_is_kept_and_backward_fetches_it_once_more():
    x, W, bias, blocks = tensors((24, 16, 4))
    fetch, kept = Fetch(W), []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = bat_col_linear_refetched(x, fetch, bias, blocks)
    assert fetch.count == 1
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), *(D.data_ptr() for D in blocks)}
    y.sum().backward()
    assert fetch.count == 2


def test_under_autocast_it_computes_as_the_ordinary_operator():
    x, W, bias, blocks = tensors((11, 13, 4), torch.float32)
    x = x.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = bat_col_linear_refetched(x, lambda: W.clone(), bias, blocks)
        want = bat_col_linear(x, W, bias, blocks)
    assert got.dtype == torch.bfloat16
    assert same_bits(got, want, Promise.SAME_PRODUCT)


def test_only_the_gradients_that_are_needed_are_computed():
    x, W, bias, (first, second) = tensors((11, 13, 4))
    second.requires_grad_(False)
    bat_col_linear_refetched(x.detach(), lambda: W.clone(), bias.detach(), [first, second]).sum().backward()
    assert first.grad is not None
    assert second.grad is None
    assert x.grad is None


def test_moves_call_the_base_and_fetch_the_weight_again_in_backward():
    x, W, bias, (first, _) = tensors((8, 12, 4))
    fetch, row = Fetch(W), random_block("bat-row", 8, 12, 4).requires_grad_()
    leaves = (x, bias, first, row)
    adapters = [("bat-col", first, 0.5), ("bat-row", row, 2.0)]
    moves = Moves(x)
    for name, block, scale in adapters:
        variants.get(name).move(moves, x, block, scale)
    got = moves.run(lambda base_x: torch.nn.functional.linear(base_x, W, bias), lambda: (fetch(), None), refetch=True)
    want = reference.forward(x, W, bias, adapters)
    assert close(got, want)
    assert fetch.count == 1
    weights = torch.randn_like(want)
    for g, w in zip(*(torch.autograd.grad(y, leaves, weights) for y in (got, want)), strict=True):
        assert close(g, w)
    assert fetch.count == 2


def test_inference_keeps_nothing_of_a_fetched_weight():
    x, W, bias, (first, _) = tensors((8, 12, 4))
    fetch, kept = Fetch(W), Kept()
    with torch.no_grad():
        for count in (1, 2):
            moves = Moves(x, kept)
            variants.get("bat-col").move(moves, x, first, 1.0)
            got = moves.run(lambda x: torch.nn.functional.linear(x, W, bias), lambda: (fetch(), None), refetch=True)
            assert close(got, reference.forward(x, W, bias, [("bat-col", first, 1.0)]))
            assert fetch.count == count
    assert not kept.values
