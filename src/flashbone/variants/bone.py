"""bone: one (r, out) matrix, the same for every input shard. `delta[a,b] = B[:, a]^T`; rank at most r."""

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone import shards
from flashbone.ops.moves import Moves
from flashbone.variants.base import Variant


class Bone(Variant):
    """`u = S(x) B`."""

    name = "bone"
    is_low_rank = True
    peft_init_weights = True
    miss_init_weights = True
    rwkv_peft_mode = "bone"

    def block_shape(self, out_features: int, in_features: int, r: int, mini_r: int) -> tuple[int, ...]:
        """(r, out)."""
        return r, out_features

    def rows(self, block: Float[Tensor, "r out"], start: int, stop: int) -> Float[Tensor, "r rows"]:
        """A column for each row."""
        return block[:, start:stop]

    def move(self, moves: Moves, x: Tensor, block: Tensor, scale: float) -> None:
        """Shifts the output."""
        moves.add_factors(x, block, scale)

    def delta(self, W: Float[Tensor, "out in"], block: Float[Tensor, "r out"]) -> Float[Tensor, "out in"]:
        """`B^T` tiled along the input; of W only the sizes are used."""
        return shards.tile(block.mT, W.shape[1])

    def to_bone(self, block: Float[Tensor, "*experts r out"], out_features: int) -> Float[Tensor, "*experts r out"]:
        """The block itself."""
        return block

    def factors(
        self, block: Float[Tensor, "r out"], out_features: int, in_features: int
    ) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """`A = [I I ... I]`, `B = block^T`: nothing is rounded, in any dtype."""
        eye = torch.eye(block.shape[0], dtype=block.dtype, device=block.device)
        return shards.tile(eye, in_features), block.mT
