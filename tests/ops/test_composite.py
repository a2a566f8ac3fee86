"""Where the moves run operators of their own, and where plain operations: transforms and inference want the latter."""

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from flashbone import variants
from flashbone.ops.cache import Kept
from flashbone.ops.moves import Moves
from helpers import reference
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import close

OUT, IN = 11, 13
OPERATORS = {"bat-row": "shift_input", "orthogonal": "rotate_input"}


def tensors(name):
    x, W = (torch.randn(n, IN, dtype=torch.float64) for n in (3, OUT))
    return x, W, random_block(name, OUT, IN, 4)


def run(name, x, W, block, kept=None):
    moves = Moves(x, kept)
    variants.get(name).move(moves, x, block, 0.7)
    return moves.run(lambda base_x: linear(base_x, W), lambda: (W, None))


@pytest.mark.parametrize("name", VARIANT_NAMES)
@pytest.mark.parametrize("has_cache", [True, False])
def test_torch_func_grad_takes_gradients_of_x_and_the_block(name, has_cache):
    x, W, block = tensors(name)
    weights = torch.linspace(-1, 2, 3 * OUT, dtype=torch.float64).view(3, OUT)

    def loss(x, block):
        return (run(name, x, W, block, Kept() if has_cache else None) * weights).sum()

    leaves = [t.clone().requires_grad_() for t in (x, block)]
    want = torch.autograd.grad(
        (reference.forward(leaves[0], W, None, [(name, leaves[1], 0.7)]) * weights).sum(), leaves
    )
    for got, wanted in zip(torch.func.grad(loss, argnums=(0, 1))(x, block), want, strict=True):
        assert close(got, wanted)


class Names(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPERATORS)
def test_training_runs_the_operators_whose_backward_keeps_little_and_inference_plain_operations(name):
    x, W, block = tensors(name)
    for kept in (None, Kept()):
        with Names() as names, torch.no_grad():
            y = run(name, x, W, block, kept)
        assert close(y, reference.forward(x, W, None, [(name, block, 0.7)]))
        assert (OPERATORS[name] in names.found) == (kept is None)
