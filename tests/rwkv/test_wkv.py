"""The time mixing of both versions: chunks against the loop over tokens, and the loop against its formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbone.rwkv import wkv6, wkv7
from helpers.comparison import close

OPS = {7: wkv7, 6: wkv6}


def inputs(version, batch=2, tokens=77, heads=3, size=8, dtype=torch.float64, decay=1.0):
    """Random ones as a model makes them; `decay` scales how far the decays spread."""

    def random(*shape):
        return torch.randn(shape, dtype=dtype)

    shape = (batch, tokens, heads, size)
    r, k, v, state = random(*shape), random(*shape), random(*shape), random(batch, heads, size, size)
    if version == 6:
        return r, -torch.exp(decay * random(*shape)), k, v, random(heads, size), state
    direction = torch.nn.functional.normalize(random(*shape), dim=-1)
    log_w = -0.6065 * torch.sigmoid(4 * decay * random(*shape))
    return r, log_w, k, v, -direction, direction * torch.sigmoid(random(*shape)), state


def by_formula(version, given):
    """Whole matrices of one head at a time, as docs/maths.md writes them."""
    r, log_w, k, v, *rest, state = given
    y, last = torch.zeros_like(r), torch.zeros_like(state)
    for n in range(r.shape[0]):
        for h in range(r.shape[2]):
            S = state[n, h]
            for t in range(r.shape[1]):
                rt, wt, kt, vt = (x[n, t, h] for x in (r, log_w.exp(), k, v))
                if version == 7:
                    a, b = (x[n, t, h] for x in rest)
                    S = S @ (torch.diag(wt) + torch.outer(a, b)) + torch.outer(vt, kt)
                    y[n, t, h] = S @ rt
                else:
                    y[n, t, h] = (S + torch.outer(vt, rest[0][h] * kt)) @ rt
                    S = S @ torch.diag(wt) + torch.outer(vt, kt)
            last[n, h] = S
    return y, last


@pytest.mark.parametrize("version", OPS)
def test_the_loop_is_the_formula(version):
    given = inputs(version, tokens=9)
    for got, want in zip(OPS[version].loop(*given), by_formula(version, given), strict=True):
        assert close(got, want)


@pytest.mark.parametrize("version", OPS)
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), tokens=st.integers(0, 100), heads=st.integers(1, 3), size=st.sampled_from([1, 4, 7, 16])
)
def test_chunks_give_what_the_loop_gives(version, batch, tokens, heads, size):
    given = inputs(version, batch, tokens, heads, size)
    want, last = OPS[version].loop(*given)
    for chunk in (32, 16):
        got = OPS[version].chunked(*given, chunk=chunk)
        assert close(got[0], want)
        assert close(got[1], last)


@pytest.mark.parametrize("version", OPS)
@pytest.mark.parametrize("decay", [0.3, 1.0, 3.0])
def test_in_fp32_chunks_stay_near_the_loop_in_fp64_however_fast_it_decays(version, decay):
    given = inputs(version, tokens=300, size=32, decay=decay)
    want = OPS[version].loop(*given)
    got = OPS[version].chunked(*(x.float() for x in given))
    for one, other in zip(got, want, strict=True):
        assert close(one, other, torch.float32)


@pytest.mark.parametrize("version", OPS)
def test_half_precision_inputs_are_mixed_in_fp32(version):
    given = inputs(version, tokens=70, dtype=torch.float32)
    rounded = [x.bfloat16() for x in given[:-1]]
    want = OPS[version].loop(*(x.float() for x in rounded), given[-1])
    for run in (OPS[version].chunked, OPS[version].loop):
        got = run(*rounded, given[-1])
        assert [x.dtype for x in got] == [torch.float32] * 2
        assert all(close(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("version", OPS)
def test_every_gradient_is_the_loop_s(version):
    given = [x.requires_grad_() for x in inputs(version)]
    found = []
    for run in (OPS[version].chunked, OPS[version].loop):
        y, last = run(*given)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append(torch.autograd.grad((y * weights).sum() + last.square().sum(), given))
    for got, want in zip(*found, strict=True):
        assert close(got, want)


@pytest.mark.parametrize("version", OPS)
def test_gradcheck_in_fp64(version):
    given = [x.requires_grad_() for x in inputs(version, batch=1, tokens=5, heads=2, size=3)]
    options = {"chunk": 4} if version == 7 else {"chunk": 4, "part": 2}
    assert torch.autograd.gradcheck(lambda *x: OPS[version].chunked(*x, **options), given)
    assert torch.autograd.gradcheck(OPS[version].loop, given)


@pytest.mark.parametrize("version", OPS)
def test_a_state_carried_over_is_one_long_sequence(version):
    given = inputs(version)
    rows, rest = list(given[:-1]), given[-1]
    want, last = OPS[version].chunked(*given)
    outputs = []
    for start, stop in ((0, 40), (40, 41), (41, 77)):
        part = [x[:, start:stop] if x.ndim == 4 else x for x in rows]
        y, rest = OPS[version].chunked(*part, rest)
        outputs.append(y)
    assert close(torch.cat(outputs, 1), want)
    assert close(rest, last)


@pytest.mark.parametrize("version", OPS)
def test_the_comparison_notices_a_wrong_operand(version):
    """Tokens moved by one, or the state transposed, are far outside the tolerances."""
    given = inputs(version, dtype=torch.float32)
    want, _ = OPS[version].loop(*given)
    moved = [x.roll(1, 1) if place == 2 else x for place, x in enumerate(given)]
    turned = [*given[:-1], given[-1].mT.contiguous()]
    for wrong in (moved, turned):
        assert not close(OPS[version].chunked(*wrong)[0], want, torch.bfloat16)


def test_shapes_that_do_not_go_together_are_refused():
    r, log_w, k, v, a, b, state = inputs(7)
    with pytest.raises(Exception, match="state"):
        wkv7.chunked(r, log_w, k, v, a, b, state[..., :4])
