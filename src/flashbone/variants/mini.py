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
    is_low_rank = True
    miss_init_weights = "mini"
    peft_size_condition = "mini_r divides the outputs of its layers"

    def block_shape(self, out_features: int, in_features: int, r: int, mini_r: int) -> tuple[int, ...]:
        """(r, mini_r)."""
        return r, mini_r

    def block_fields(self, block: Float[Tensor, "*experts r mini_r"]) -> dict[str, int]:
        """r and mini_r."""
        return {"r": block.shape[-2], "mini_r": block.shape[-1]}

    def period(self, block: Float[Tensor, "r mini_r"]) -> int:
        """mini_r."""
        return block.shape[1]

    def move(self, moves: Moves, x: Tensor, block: Tensor, scale: float) -> None:
        """Shifts the output."""
        moves.add_tiled_factors(x, block, scale)

    def delta(self, W: Float[Tensor, "out in"], block: Float[Tensor, "r mini_r"]) -> Float[Tensor, "out in"]:
        """`B^T` tiled along both axes; of W only the sizes are used."""
        return shards.tile(shards.tile(block, W.shape[0]).mT, W.shape[1])

    def to_bone(self, block: Float[Tensor, "*experts r mini_r"], out_features: int) -> Float[Tensor, "*experts r out"]:
        """The block tiled along the output."""
        return shards.tile(block, out_features).contiguous()

    def factors(
        self, block: Float[Tensor, "r mini_r"], out_features: int, in_features: int
    ) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """Those of `bone`."""
        return Bone().factors(shards.tile(block, out_features), out_features, in_features)
