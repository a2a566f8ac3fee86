"""bat-col for few tokens and a large weight: the block is multiplied to the activations, and no W' is built."""

import pytest
import torch

from flashbone.ops import bat_col
from helpers import reference
from helpers.blocks import SIZES, random_block
from helpers.comparison import close


@pytest.fixture
def always_large(monkeypatch):
    monkeypatch.setattr(bat_col, "_SMALL", 0)


def tensors(out: int, in_: int, tokens: int, *sizes: int):
    x, W, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((tokens, in_), (out, in_), (out,)))
    return x, W / in_**0.5, bias, [random_block("bat-col", out, in_, r) for r in sizes]


def builds_weight(monkeypatch, tokens: int, *sizes: int) -> bool:
    built, original = [], bat_col.shifted_weight
    with monkeypatch.context() as patch:
        patch.setattr(bat_col, "shifted_weight", lambda *args: built.append(1) or original(*args))
        x, W, bias, blocks = tensors(11, 13, tokens, *sizes)
        got = bat_col.bat_col_linear(x, W, bias, blocks)
    assert close(got, reference.forward(x, W, bias, [("bat-col", D, 1.0) for D in blocks]))
    return bool(built)


@pytest.mark.parametrize("composite", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("size", [(out, in_, r) for out, in_, r in SIZES if r > 2], ids=str)
def test_output_and_gradients_are_those_of_the_oracle(always_large, size, with_base, has_bias, composite):
    out, in_, r = size
    x, W, bias, blocks = tensors(out, in_, (r - 1) // 2, r, r + 1)
    leaves = [t.requires_grad_() for t in (x, W, *([bias] if has_bias else []), *blocks)]
    got = bat_col.bat_col_linear(x, W, bias if has_bias else None, blocks, with_base, composite)
    want = reference.forward(x, W, bias if has_bias else None, [("bat-col", D, 1.0) for D in blocks])
    want = want if with_base else want - x @ W.T
    weights = torch.randn_like(want)
    assert close(got, want)
    for g, w in zip(*(torch.autograd.grad(y, leaves, weights) for y in (got, want)), strict=True):
        assert close(g, w)


def test_it_is_for_fewer_tokens_than_half_the_smallest_block(always_large, monkeypatch):
    assert not builds_weight(monkeypatch, 1, 3)
    assert not builds_weight(monkeypatch, 2, 5, 6)
    assert builds_weight(monkeypatch, 1, 2)
    assert builds_weight(monkeypatch, 2, 4)
    assert builds_weight(monkeypatch, 2, 4, 8)


def test_it_is_for_weights_above_a_size(monkeypatch):
    monkeypatch.setattr(bat_col, "_SMALL", 11 * 13 - 1)
    assert not builds_weight(monkeypatch, 1, 4)
    monkeypatch.setattr(bat_col, "_SMALL", 11 * 13)
    assert builds_weight(monkeypatch, 1, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_layer_in_the_dtypes_of_its_tensors(dtype):
    x, W, bias, blocks = (torch.randn(2, 300, dtype=dtype), torch.randn(260, 300) / 17, torch.randn(260), [])
    blocks = [random_block("bat-col", 260, 300, 16, dtype=torch.float32, std=0.05)]
    got = bat_col.bat_col_linear(x, W, bias, blocks)
    assert got.dtype == dtype
    assert close(got, reference.forward(x, W, bias, [("bat-col", blocks[0], 1.0)]), dtype)
