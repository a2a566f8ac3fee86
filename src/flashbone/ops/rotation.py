"""The rotation of `orthogonal`: a block becomes `Q - I`, and every whole shard of x is multiplied with Q.

An operator of its own (`flashbone::rotate_input`) with a hand-written backward, which adds up the gradients of x in one
pass and keeps x and `Q - I` only. Derivation: docs/maths.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone import shards
from flashbone.ops import transforms
from flashbone.ops.autocast import without_autocast

# Where the Cayley map is solved in fp64. In fp32 a block of odd size, whose skew part has an eigenvalue 0 always, loses
# its orthogonality as the block grows (1e-3 at entries of 1e3). A CPU is as fast, but for a fifth at r = 256.
SOLVED_IN_FP64 = ("cpu", "cuda")


def rotation_offset(P: Float[Tensor, "r r"], use_orthogonal: bool, eps: float) -> Float[Tensor, "r r"]:
    """`Q - I`, in fp32 (fp64 for fp64): of the Cayley map `Q = (1 + eps) ((1 + eps) I - A)^-1 (I + A)`, `A = P - P^T`,
    or, without `use_orthogonal`, of `Q = I + P`.

    Solved as `Q - I = (2 + eps) ((1 + eps) I - A)^-1 A`: exactly zero at P = 0, and small offsets are not rounded
    against I. No system is singular: the smallest singular value is 1 + eps at least. Autograd keeps the result alone,
    and its backward solves nothing.
    """
    if not use_orthogonal:
        return P.to(shards.opmath_dtype(P))
    return _cayley_offset(P, eps) if transforms.are_active() else _CayleyOffset.apply(P, eps)


def _cayley_offset(P: Tensor, eps: float) -> Tensor:
    dtype = shards.opmath_dtype(P)
    with without_autocast(P.device.type):
        A = P.to(torch.float64 if P.device.type in SOLVED_IN_FP64 else dtype)
        A = A - A.mT
        ridge = (1 + eps) * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        return ((2 + eps) * torch.linalg.solve_ex(ridge - A, A).result).to(dtype)


class _CayleyOffset(torch.autograd.Function):
    """`E = (2 + eps) M^-1 A` with `A = (1 + eps) I - M`, so that the result holds the inverse which backward needs:
    `M^-1 = (I + E / (2 + eps)) / (1 + eps)`, and `dE = (2 + eps)(1 + eps) M^-1 dA M^-1`."""

    @staticmethod
    def forward(ctx: Any, P: Tensor, eps: float) -> Tensor:
        E = _cayley_offset(P, eps)
        ctx.save_for_backward(E)
        ctx.eps, ctx.dtype = eps, P.dtype
        return E

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (E,), eps = ctx.saved_tensors, ctx.eps
        with without_autocast(E.device.type):
            eye = torch.eye(E.shape[-1], dtype=E.dtype, device=E.device)
            inverse = ((eye + E / (2 + eps)) / (1 + eps)).mT
            grad_A = (2 + eps) * (1 + eps) * (inverse @ grad @ inverse)
            return (grad_A - grad_A.mT).to(ctx.dtype), None


def orthogonality_error(Q: Float[Tensor, "r r"]) -> float:
    """`max |Q^T Q - I|`, over all entries; computed in fp64."""
    Q = Q.detach().double()
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)).abs().max())


def rotation_angle_deg(Q: Float[Tensor, "r r"]) -> float:
    """The largest angle, in degrees from 0 to 180, by which Q turns a plane; of a Q that also stretches, that of its
    nearest orthogonal matrix (the polar factor)."""
    U, _, Vh = torch.linalg.svd(Q.detach().double())
    return float(torch.rad2deg(torch.linalg.eigvals(U @ Vh).angle().abs().max()))


def rotate_input(
    x: Float[Tensor, "tokens in"],
    E: Float[Tensor, "r r"],
    base_x: Float[Tensor, "tokens in"] | None = None,
    composite: bool = False,
) -> Float[Tensor, "tokens in"]:
    """`base_x + z` (None: `x + z`) with `z_b = x_b E^T` for every whole shard, zero in a ragged tail; one dtype.

    Args:
        x: What the adapter sees.
        E: `Q - I`, scaled; the same for all shards, so that all of them are one GEMM.
        base_x: What the base is to see, shifted by others already.
        composite: Plain torch operations instead of the operator, for torch.func's transforms and in inference.
    """
    return _forward(x, E, base_x) if composite else torch.ops.flashbone.rotate_input(x, E, base_x)


def _forward(x: Tensor, E: Tensor, base_x: Tensor | None) -> Tensor:
    if not x.shape[-1] % E.shape[-1]:  # apart: a decoding step feels each of the lines below
        rows = _rows(x, E)
        return torch.addmm(rows if base_x is None else _rows(base_x, E), rows, E.mT).view_as(x)
    whole, tail = shards.full_and_tail(x, E.shape[-1])
    base_whole, tail = (whole, tail) if base_x is None else shards.full_and_tail(base_x, E.shape[-1])
    return _with_tail(torch.addmm(_rows(base_whole, E), _rows(whole, E), E.mT), tail, whole.shape)


def _backward(grad: Tensor, x: Tensor, E: Tensor, x_is_base: bool, need_x: bool, need_E: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (with the base's share if it is what the base sees) and E; empty where not needed."""
    (whole, _), (grad_whole, grad_tail) = shards.full_and_tail(x, E.shape[-1]), shards.full_and_tail(grad, E.shape[-1])
    g = _rows(grad_whole, E)
    grad_x, grad_E = x.new_empty(0), E.new_empty(0)
    if need_x:
        tail = grad_tail if x_is_base else torch.zeros_like(grad_tail)
        grad_x = _with_tail(torch.addmm(g, g, E) if x_is_base else g @ E, tail, whole.shape)
    if need_E:
        grad_E = g.mT @ _rows(whole, E)
    return grad_x, grad_E


def _rows(whole: Tensor, E: Tensor) -> Tensor:
    """(tokens, n, r) or (tokens, n * r) as (tokens * n, r): a view where no ragged tail follows."""
    return whole.reshape(-1, E.shape[-1])


def _with_tail(rows: Tensor, tail: Tensor, shape: torch.Size) -> Tensor:
    """(tokens * n, r) and the tail (tokens, k) as (tokens, in)."""
    whole = rows.view(shape[0], shape[1] * shape[2])
    return torch.cat([whole, tail], -1) if tail.shape[-1] else whole


@torch.library.custom_op("flashbone::rotate_input", mutates_args=())
def _rotate_input(x: Tensor, E: Tensor, base_x: Tensor | None) -> Tensor:
    with without_autocast(x.device.type):
        return _forward(x, E, base_x)


@_rotate_input.register_fake
def _(x: Tensor, E: Tensor, base_x: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("flashbone::rotate_input_backward", mutates_args=())
def _rotate_input_backward(
    grad: Tensor, x: Tensor, E: Tensor, x_is_base: bool, need_x: bool, need_E: bool
) -> tuple[Tensor, Tensor]:
    with without_autocast(x.device.type):
        return _backward(grad, x, E, x_is_base, need_x, need_E)


@_rotate_input_backward.register_fake
def _(grad: Tensor, x: Tensor, E: Tensor, x_is_base: bool, need_x: bool, need_E: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), E.new_empty(E.shape if need_E else 0)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, E, base_x = inputs
    ctx.save_for_backward(x, E)
    ctx.x_is_base = base_x is None


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_E, _ = ctx.needs_input_grad
    # With create_graph the plain operations are called, which autograd can differentiate once more.
    run: Callable = _backward if torch.is_grad_enabled() else torch.ops.flashbone.rotate_input_backward
    grad_x, grad_E = run(grad, *ctx.saved_tensors, ctx.x_is_base, need_x, need_E)
    return grad_x if need_x else None, grad_E if need_E else None, None if ctx.x_is_base else grad


_rotate_input.register_autograd(_autograd, setup_context=_setup_context)
