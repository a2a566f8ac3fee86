"""mini: bone with a (r, mini_r) matrix that is tiled along the output as well."""

from jaxtyping import Float
from torch import Tensor

from flashbone import shards
from flashbone.ops.moves import Moves
from flashbone.variants.base import Variant
from flashbone.variants.bone import Bone


class Mini(Variant):
    """`u = tile(S(x) B)`: the product is as narrow as the block."""

    name = "mini"

    def block_shape(self, out_features: int, in_features: int, r: int, mini_r: int) -> tuple[int, ...]:
        """(r, mini_r)."""
        return r, mini_r

    def period(self, block: Float[Tensor, "r mini_r"]) -> int:
        """mini_r."""
        return block.shape[1]

    def move(self, moves: Moves, x: Tensor, block: Tensor, scale: float) -> None:
        """Shifts the output."""
        moves.add_tiled_factors(x, block, scale)

    def delta(self, W: Float[Tensor, "out in"], block: Float[Tensor, "r mini_r"]) -> Float[Tensor, "out in"]:
        """`B^T` tiled along both axes; of W only the sizes are used."""
        return shards.tile(shards.tile(block, W.shape[0]).mT, W.shape[1])

    def factors(
        self, block: Float[Tensor, "r mini_r"], out_features: int, in_features: int
    ) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """Those of `bone` with the block tiled along the output."""
        return Bone().factors(shards.tile(block, out_features), out_features, in_features)
