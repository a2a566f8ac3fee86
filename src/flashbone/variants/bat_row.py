"""bat-row: one r x r block for each input shard. `delta[a,b] = W[a,b] D_b + D_b`; RWKV-PEFT's `mode: bat`."""

import torch
from jaxtyping import Float
from torch import Tensor

from flashbone import shards
from flashbone.ops.moves import Moves
from flashbone.variants.affine import solve_affine
from flashbone.variants.base import Variant


class BatRow(Variant):
    """`z_b = x_b D_b^T` shifts the input, `tile(sum_b z_b)` the output; no weight is read."""

    name = "bat-row"
    rwkv_peft_mode = "bat"
    delta_depends_on_weight = True

    def block_shape(self, out_features: int, in_features: int, r: int, mini_r: int) -> tuple[int, ...]:
        """(n_in, r, r)."""
        return shards.count(in_features, r), r, r

    def period(self, block: Float[Tensor, "n_in r r"]) -> int:
        """r."""
        return block.shape[-1]

    def move(self, moves: Moves, x: Tensor, block: Tensor, scale: float) -> None:
        """Shifts input and output."""
        moves.add_input_shift(x, block, scale)

    def delta(self, W: Float[Tensor, "out in"], block: Float[Tensor, "n_in r r"]) -> Float[Tensor, "out in"]:
        """`W[a,b] D_b + D_b`, in W's dtype."""
        D = block.to(W.dtype)
        blocks = shards.split_weight(W, D.shape[-1])  # (n_out, r, n_in, r)
        product = torch.einsum("aibk,bkj->aibj", blocks, D) + D.transpose(0, 1)
        return shards.join_weight(product, *W.shape)

    def undo(
        self, merged: Float[Tensor, "out in"], block: Float[Tensor, "n_in r r"], scale: float
    ) -> Float[Tensor, "out in"]:
        """`W[a,b] = (merged[a,b] - D_b) (I + D_b)^-1`."""
        return solve_affine(merged, block.unsqueeze(0) * scale)
