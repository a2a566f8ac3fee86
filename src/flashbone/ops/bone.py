"""The output shift of bone: `y + S(x) B`, one addmm onto the base's output."""

import torch
from jaxtyping import Float
from torch import Tensor


def add_factored(
    y: Float[Tensor, "*batch out"], s: Float[Tensor, "*batch r"], B: Float[Tensor, "r out"]
) -> Float[Tensor, "*batch out"]:
    """`y + s B` in y's dtype, out of place.

    Plain torch, no hand-written backward: of y's size autograd keeps nothing, only s and B. An in-place addmm measured
    0 to 4% faster, but fails under torch.compile and on a y that is a view (docs/maths.md, "What was tried").
    """
    flat = torch.addmm(y.reshape(-1, y.shape[-1]), s.to(y.dtype).reshape(-1, s.shape[-1]), B.to(y.dtype))
    return flat.view(y.shape)
