"""orthogonal: one r x r block that rotates every whole input shard. `delta[a,b] = W[a,b] (Q - I)`; the "bottleneck
orthogonal" Bone. A ragged tail shard is left as it is, so that the rotation of the input stays orthogonal."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone import shards
from flashbone.errors import ShapeError
from flashbone.ops.moves import Moves
from flashbone.ops.rotation import orthogonality_error, rotation_angle_deg, rotation_offset
from flashbone.variants.base import Variant

DEFAULT_EPS, MAX_EPS = 1e-6, 1e-2


@dataclass(frozen=True)
class Orthogonal(Variant):
    """`z_b = x_b (Q - I)^T` shifts the input; no weight is read.

    Attributes:
        use_orthogonal: Q is the Cayley map of the block; False: `Q = I + P`, unconstrained.
        eps: Ridge of the Cayley map: `max |Q^T Q - I| <= 2 eps + eps^2`.
    """

    use_orthogonal: bool = True
    eps: float = DEFAULT_EPS

    def __post_init__(self) -> None:
        if not self.use_orthogonal:  # it has no ridge, and is equal to any other such
            object.__setattr__(self, "eps", DEFAULT_EPS)

    name = "orthogonal"
    delta_depends_on_weight = True
    config_fields = {"use_orthogonal": "use_orthogonal", "orthogonal_eps": "eps"}
    size_field = "bottleneck_size"

    @property
    def is_linear(self) -> bool:
        return not self.use_orthogonal

    def block_shape(self, out_features: int, in_features: int, r: int, mini_r: int) -> tuple[int, ...]:
        """(r, r), r at most in_features."""
        if r > in_features:
            raise ShapeError(
                f"a bottleneck of {r} is larger than the {in_features} input features of this layer, so that it would"
                " rotate nothing; choose a smaller one, give this layer its own in rank_pattern, or exclude it"
            )
        return r, r

    def offset(self, block: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
        """`Q - I`, in fp32 (fp64 for an fp64 block), differentiable."""
        return rotation_offset(block, self.use_orthogonal, self.eps)

    def solved(self, block: Float[Tensor, "r r"]) -> tuple[Variant, Float[Tensor, "r r"]]:
        """The unconstrained twin with this Q."""
        return (Orthogonal(use_orthogonal=False), self.offset(block)) if self.use_orthogonal else (self, block)

    def orthogonality_error(self, block: Float[Tensor, "r r"]) -> float:
        """`max |Q^T Q - I|` over all entries."""
        offset = self.offset(block.detach()).cpu()
        return orthogonality_error(offset.double() + torch.eye(offset.shape[-1]))

    def angle_deg(self, block: Float[Tensor, "r r"]) -> float:
        """The largest angle, in degrees from 0 to 180, by which Q turns a plane; without `use_orthogonal`, that of the
        orthogonal matrix nearest to Q. NaN for a block that is not finite."""
        P = block.detach().cpu().double()
        if not torch.isfinite(P).all():
            return math.nan
        if not self.use_orthogonal:
            return rotation_angle_deg(P + torch.eye(P.shape[-1]))
        a = torch.linalg.matrix_norm(P - P.mT, 2)
        return float(torch.rad2deg(a.atan() + (a / (1 + self.eps)).atan()))

    def move(self, moves: Moves, x: Tensor, block: Tensor, scale: float) -> None:
        """Shifts the input."""
        moves.add_rotation(x, block, scale, self.use_orthogonal, self.eps)

    def delta(self, W: Float[Tensor, "out in"], block: Float[Tensor, "r r"]) -> Float[Tensor, "out in"]:
        """`W[a,b] (Q - I)`, zero in the columns of a ragged tail; in W's dtype."""
        whole, tail = shards.full_and_tail(W, block.shape[-1])
        rotated = (whole @ self.offset(block).to(W.dtype)).flatten(-2)
        return torch.cat([rotated, torch.zeros_like(tail)], -1)

    def undo(
        self, merged: Float[Tensor, "out in"], block: Float[Tensor, "r r"], scale: float
    ) -> Float[Tensor, "out in"]:
        """`W[a,b] = merged[a,b] (I + scale (Q - I))^-1` for whole shards."""
        whole, tail = shards.full_and_tail(merged, block.shape[-1])
        system = torch.eye(block.shape[-1], dtype=merged.dtype, device=merged.device) + self.offset(block) * scale
        return torch.cat([torch.linalg.solve(system, whole, left=False).flatten(-2), tail], -1)
