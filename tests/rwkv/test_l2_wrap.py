"""The L2-wrap, called as users call it, against the sentence of its docstring written out."""

import pytest
import torch

from flashbone.rwkv import l2_wrap

LEARNED = torch.tensor([[True, True, False], [False, True, True]])


def both(learned, items, factor):
    """Value and gradient of the wrapped loss, and of the loss with the penalty added."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    loss = logits.square().mean()
    got = l2_wrap(loss, logits, learned, items, factor)
    largest = logits.max(-1).values
    counted = largest if learned is None else largest[learned]
    count = counted.numel() if items is None else items
    want = loss + factor / 2 * counted.square().sum() / count
    return loss, got, [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (got, want, loss)]


@pytest.mark.parametrize("factor", [1e-4, 0.5])
@pytest.mark.parametrize("items", [None, 9, torch.tensor(9)])
@pytest.mark.parametrize("learned", [None, LEARNED])
def test_the_wrap_keeps_the_loss_and_adds_the_gradient_of_the_mean_square_of_the_largest(learned, items, factor):
    loss, got, (grad, want, bare) = both(learned, items, factor)
    assert got.item() == loss.item()
    torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-9)  # the largest are squared in fp32
    assert (grad - bare).abs().max() > 1e-2 * factor


def test_no_learned_token_is_no_division_by_zero():
    logits = torch.randn(1, 2, 5, requires_grad=True)
    wrapped = l2_wrap(logits.sum() * 0, logits, torch.zeros(1, 2, dtype=torch.bool))
    assert wrapped.item() == 0
    assert torch.autograd.grad(wrapped, logits)[0].abs().max() == 0
