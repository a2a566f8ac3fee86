"""bat-col: one r x r block for each output shard. `delta[a,b] = W[a,b] D_a + D_a`; PEFT's `init_weights="bat"`."""

from jaxtyping import Float
from torch import Tensor

from flashbone import shards
from flashbone.ops.bat_col import weight_delta
from flashbone.ops.moves import Moves
from flashbone.variants.affine import solve_affine
from flashbone.variants.base import Variant


class BatCol(Variant):
    """`dW = W D + D`: does not factor on the activations, so the weight itself is shifted."""

    name = "bat-col"
    peft_init_weights = "bat"
    miss_init_weights = "bat"
    peft_size_condition = "r divides the sizes of its layers"
    reads_weight = True
    delta_depends_on_weight = True

    def block_shape(self, out_features: int, in_features: int, r: int, mini_r: int) -> tuple[int, ...]:
        """(n_out, r, r)."""
        return shards.count(out_features, r), r, r

    def period(self, block: Float[Tensor, "n_out r r"]) -> int:
        """r."""
        return block.shape[-1]

    def rows(self, block: Float[Tensor, "n_out r r"], start: int, stop: int) -> Float[Tensor, "n r r"]:
        """A D for each output shard."""
        r = block.shape[-1]
        return block[start // r : shards.count(stop, r)]

    def move(self, moves: Moves, x: Tensor, block: Tensor, scale: float) -> None:
        """Shifts the weight."""
        moves.add_weight_shift(x, block, scale)

    def delta(self, W: Float[Tensor, "out in"], block: Float[Tensor, "n_out r r"]) -> Float[Tensor, "out in"]:
        """`W[a,b] D_a + D_a`, in W's dtype."""
        return weight_delta(W, block)

    def undo(
        self, merged: Float[Tensor, "out in"], block: Float[Tensor, "n_out r r"], scale: float
    ) -> Float[Tensor, "out in"]:
        """`W[a,b] = (merged[a,b] - D_a) (I + D_a)^-1`."""
        return solve_affine(merged, block.unsqueeze(1) * scale)
