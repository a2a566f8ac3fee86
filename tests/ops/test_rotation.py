"""The Cayley map of `orthogonal`: how orthogonal it is, at what size of block, and how its gradient is bounded."""

import math

import pytest
import torch

from flashbone import variants
from flashbone.ops.rotation import orthogonality_error, rotation_angle_deg, rotation_offset
from helpers import reference
from helpers.comparison import Promise, close, relative_error, same_bits

MAGNITUDES = [10.0**k for k in range(-5, 6)]
# Even and odd: the skew part of an odd block is singular, so that its system is as ill-conditioned as it is large.
SIZES = [2, 7, 8, 32, 33, 64, 129, 256]
FP32_ROUNDING = 1e-6


def offset(P: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return rotation_offset(P, True, eps)


def as_q(E: torch.Tensor) -> torch.Tensor:
    return E.double() + torch.eye(len(E), dtype=torch.float64)


@pytest.mark.parametrize("eps", [1e-8, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("r", SIZES)
def test_the_error_of_orthogonality_stays_below_two_eps_at_every_size_of_the_block(r, eps):
    direction = torch.randn(r, r)
    errors = [orthogonality_error(as_q(offset(direction * m, eps))) for m in MAGNITUDES]
    assert max(errors) <= 2 * eps + eps**2 + FP32_ROUNDING
    if eps >= 1e-4:  # the ridge is what the error is made of, not rounding: it is as large as it may be
        assert errors[-1] >= 1.5 * eps
        assert errors[0] < 0.01 * eps


def test_the_bound_on_the_error_can_fail():
    P = torch.randn(8, 8)
    assert orthogonality_error(as_q(rotation_offset(P, False, 1e-2))) > 0.1
    assert orthogonality_error(as_q(offset(P, 1e-2))) > 2 * 1e-6 + FP32_ROUNDING


@pytest.mark.parametrize("r", [7, 32])
def test_solve_and_gradient_stay_bounded_over_ten_orders_of_magnitude(r):
    """M = (1 + eps) I - A has no singular value below 1 + eps. So |Q - I| <= 2 + eps. With dQ = (2 + eps)(1 + eps) M^-1
    dA M^-1 the gradient of A is at most (2 + eps) / (1 + eps) of what comes in, less for larger eps; P's is twice."""
    direction, grad = torch.randn(r, r), torch.randn(r, r)
    norm = torch.linalg.matrix_norm
    sizes = {}
    for eps in (1e-8, 1e-6, 1e-4, 1e-2):
        for m in MAGNITUDES:
            P = (direction * m).requires_grad_()
            E = offset(P, eps)
            (grad_P,) = torch.autograd.grad(E, P, grad)
            assert norm(E.detach(), 2) <= (2 + eps) * (1 + 1e-5)
            assert norm(grad_P, 2) <= 2 * (2 + eps) / (1 + eps) * norm(grad, 2) * (1 + 1e-5)
            sizes[eps, m] = float(norm(grad_P))
    for eps in (1e-4, 1e-2):  # the bound is reached where the block is small
        damped = (2 + eps) / (1 + eps) / 2
        assert sizes[eps, 1e-5] / sizes[1e-8, 1e-5] == pytest.approx(damped, rel=1e-3 * (1 - damped) + 1e-6)
    if (
        r % 2 == 0
    ):  # far out the map saturates instead of exploding; an odd block always keeps one direction that does not
        assert sizes[1e-6, 1e5] < 1e-6 * sizes[1e-6, 1e-5]


@pytest.mark.parametrize(("size", "tolerance"), [(0.1, 1e-6), (1, 1e-6), (100, 1e-4), (1e3, 1e-3)])
@pytest.mark.parametrize("r", [32, 33])
def test_gradients_point_where_those_of_fp64_do(r, size, tolerance):
    P, grad = torch.randn(r, r) * size, torch.randn(r, r)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = P.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(offset(leaf), leaf, grad.to(dtype))[0])
    assert relative_error(*gradients) < tolerance
    assert relative_error(gradients[0].T, gradients[1]) > 0.1


def test_the_map_and_the_delta_under_transforms_of_torch_func():
    W, P = torch.randn(5, 8, dtype=torch.float64), torch.randn(2, 4, 4, dtype=torch.float64)
    delta = variants.get("orthogonal").delta

    def loss(P):
        return delta(W, P).sin().sum()

    leaf = P[0].clone().requires_grad_()
    assert close(torch.func.grad(loss)(P[0]), torch.autograd.grad(loss(leaf), leaf)[0])
    assert close(torch.func.vmap(offset)(P), torch.stack([offset(p) for p in P]))


@pytest.mark.parametrize("use_orthogonal", [True, False])
def test_the_figures_of_a_broken_block_are_nan(use_orthogonal):
    variant = variants.get("orthogonal", use_orthogonal=use_orthogonal)
    for bad in (torch.nan, torch.inf):
        P = torch.randn(4, 4)
        P[0, 1] = bad
        assert math.isnan(variant.angle_deg(P))
        assert not variant.orthogonality_error(P) < torch.inf


@pytest.mark.parametrize("r", [1, 2, 5, 16])
def test_a_zero_block_is_the_identity_and_blocks_follow_the_formula(r):
    assert not offset(torch.zeros(r, r)).any()
    P = torch.randn(r, r, dtype=torch.float64)
    for eps in (1e-6, 1e-2):
        assert close(as_q(offset(P, eps)), reference.rotation(P, eps))
    assert close(offset(P.float()).double(), reference.rotation(P.float()) - torch.eye(r), torch.float32)
    assert same_bits(rotation_offset(P, False, 1e-6), P, Promise.UNTOUCHED)
    assert not offset(P + P.T - torch.diag(torch.ones(r))).any()  # only the skew part rotates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_map_is_solved_in_fp32_at_least_also_under_autocast(dtype):
    P = (torch.randn(8, 8, dtype=torch.float64) * 0.3).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        E = offset(P)
    assert E.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert close(as_q(E.detach()), reference.rotation(P.detach()), E.dtype)
    E.sum().backward()
    assert P.grad is not None
    assert P.grad.dtype == dtype


def test_gradients_of_the_map_in_fp64():
    P = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda P: offset(P, 1e-2), P)
    assert torch.autograd.gradgradcheck(lambda P: offset(P, 1e-2), P)


def test_the_angle_of_a_plane_rotation_is_read_off():
    for degrees in (0.0, 30.0, 90.0, 179.0, -45.0):
        c, s = torch.cos(torch.deg2rad(torch.tensor(degrees))), torch.sin(torch.deg2rad(torch.tensor(degrees)))
        Q = torch.eye(5)
        Q[1:3, 1:3] = torch.tensor([[c, -s], [s, c]])
        assert rotation_angle_deg(Q) == pytest.approx(abs(degrees), abs=1e-3)
        assert rotation_angle_deg(1.5 * Q) == pytest.approx(abs(degrees), abs=1e-3)  # stretching turns nothing
    A = torch.zeros(4, 4, dtype=torch.float64)
    A[0, 1] = 0.25  # the Cayley map of a skew part a turns by 2 atan(a), for eps -> 0
    assert rotation_angle_deg(as_q(offset(A, 1e-12))) == pytest.approx(
        2 * torch.rad2deg(torch.atan(torch.tensor(0.25)))
    )


@pytest.mark.parametrize("use_orthogonal", [True, False])
@pytest.mark.parametrize("r", [1, 2, 5, 8])
def test_the_figures_of_a_block_are_those_of_its_q(r, use_orthogonal):
    P = torch.randn(r, r, dtype=torch.float64)
    for eps in (1e-6, 1e-2):
        variant = variants.get("orthogonal", use_orthogonal=use_orthogonal, eps=eps)
        Q = reference.rotation(P, eps) if use_orthogonal else torch.eye(r, dtype=torch.float64) + P
        assert variant.angle_deg(P) == pytest.approx(rotation_angle_deg(Q), abs=1e-9)
        error = float((Q.T @ Q - torch.eye(r, dtype=torch.float64)).abs().max())
        assert variant.orthogonality_error(P) == pytest.approx(error, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("use_orthogonal", [True, False])
def test_nothing_is_left_to_be_solved_in_what_stands_for_a_rotation(use_orthogonal):
    variant, P = variants.get("orthogonal", use_orthogonal=use_orthogonal), torch.randn(4, 4, dtype=torch.float64)
    W = torch.randn(6, 13, dtype=torch.float64)
    twin, block = variant.solved(P)
    assert twin.is_linear
    assert close(twin.delta(W, block), variant.delta(W, P))
