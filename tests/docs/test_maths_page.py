"""The page on the mathematics: each formula, written here once more as the page has it, on ragged sizes."""

import cmath
import itertools
import math

import pytest
import torch
from torch.autograd.functional import jvp
from torch.nn.functional import conv2d, embedding, pad, unfold

from flashbone import variants
from flashbone.ops.rotation import rotation_offset
from helpers import reference
from helpers.blocks import adapted, random_block
from helpers.comparison import close

OUT, IN, R = 10, 14, 4  # those of docs/images/shards.svg
N_OUT, N_IN = 3, 4


def padded(W: torch.Tensor, out: int = N_OUT * R, into: int = N_IN * R) -> torch.Tensor:
    return pad(W, (0, into - W.shape[1], 0, out - W.shape[0]))


def block(W: torch.Tensor, a: int, b: int) -> torch.Tensor:
    return padded(W)[a * R : a * R + R, b * R : b * R + R]


def delta_of_block(name: str, W: torch.Tensor, trained: torch.Tensor, a: int, b: int) -> torch.Tensor:
    """The column "delta of W[a,b]" of the page's table."""
    if name in ("bone", "mini"):
        B = trained if name == "bone" else trained.repeat(1, OUT)[:, :OUT]
        return pad(B, (0, N_OUT * R - OUT))[:, a * R : a * R + R].T
    if name == "orthogonal":
        whole = b * R + R <= IN
        return block(W, a, b) @ (reference.rotation(trained) - torch.eye(R)) * whole
    D = trained[a if name == "bat-col" else b]
    return block(W, a, b) @ D + D


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_the_table_is_what_the_oracle_and_the_variants_compute(name):
    W, trained = torch.randn(OUT, IN, dtype=torch.float64), random_block(name, OUT, IN, R)
    rows = [torch.cat([delta_of_block(name, W, trained, a, b) for b in range(N_IN)], 1) for a in range(N_OUT)]
    delta = torch.cat(rows)[:OUT, :IN]
    assert close(reference.delta(name, W, trained), delta)
    assert close(variants.get(name).delta(W, trained), delta)
    parameters = {
        "bone": R * OUT,
        "mini": R * 3,
        "bat-col": N_OUT * R * R,
        "bat-row": N_IN * R * R,
        "orthogonal": R * R,
    }
    assert trained.numel() == parameters[name]


def shards_of(x: torch.Tensor) -> torch.Tensor:
    return pad(x, (0, N_IN * R - IN)).view(len(x), N_IN, R)


def moves_of(name: str, x: torch.Tensor, W: torch.Tensor, trained: torch.Tensor) -> dict[str, torch.Tensor]:
    """z, u and dW as the paragraphs of the page have them."""
    x_b, S = shards_of(x), shards_of(x).sum(1)
    if name == "bone":
        return {"u": S @ trained}
    if name == "mini":
        return {"u": (S @ trained).repeat(1, OUT)[:, :OUT]}
    if name == "bat-row":
        z = torch.einsum("tbj,bij->tbi", x_b, trained)
        return {"z": z.flatten(1)[:, :IN], "u": z.sum(1).repeat(1, N_OUT)[:, :OUT]}
    if name == "orthogonal":
        z = x_b @ (reference.rotation(trained) - torch.eye(R)).T
        z[:, -1] = 0  # the ragged tail stays as it is
        return {"z": z.flatten(1)[:, :IN]}
    rows = padded(W).view(N_OUT, R * N_IN, R)  # row (i, b) of matrix a is row i of block [a,b]
    dW = (rows @ trained).view(N_OUT, R, N_IN, R) + trained.unsqueeze(2)
    return {"dW": dW.reshape(N_OUT * R, N_IN * R)[:OUT, :IN]}


def test_three_moves_of_all_variants_add_up_to_the_shifted_weight():
    W, bias = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)
    x = torch.randn(5, IN, dtype=torch.float64)
    adapters = [(name, random_block(name, OUT, IN, R), scale) for scale, name in enumerate(variants.VARIANTS, 1)]
    z, u, dW = torch.zeros_like(x), x.new_zeros(5, OUT), torch.zeros_like(W)
    for name, trained, scale in adapters:
        found = moves_of(name, x, W, trained)
        z, u, dW = z + scale * found.get("z", 0), u + scale * found.get("u", 0), dW + scale * found.get("dW", 0)
    y = (x + z) @ W.T + bias + u + x @ dW.T
    assert close(y, reference.forward(x, W, bias, [(name, trained, float(s)) for name, trained, s in adapters]))
    assert close(y, adapted(x, W, bias, [(name, trained, float(s)) for name, trained, s in adapters[::-1]]))
    assert not close((x + z) @ (W + dW).T + bias + u, y)  # a shifted weight sees the pristine x


def gradients(name: str) -> tuple[torch.Tensor, ...]:
    """x, W, block, the gradient of the output, and the oracle's gradients of x, W and block."""
    leaves = torch.randn(5, IN, dtype=torch.float64), torch.randn(OUT, IN, dtype=torch.float64)
    x, W, trained = (t.requires_grad_() for t in (*leaves, random_block(name, OUT, IN, R)))
    g_y = torch.randn(5, OUT, dtype=torch.float64)
    found = torch.autograd.grad(reference.forward(x, W, None, [(name, trained, 1.0)]), [x, W, trained], g_y)
    return x.detach(), W.detach(), trained.detach(), g_y, *found


def test_the_gradients_of_bat_row():
    x, W, D, g_y, dx, _, dD = gradients("bat-row")
    g_b, h = shards_of(g_y @ W), pad(g_y, (0, N_OUT * R - OUT)).view(5, N_OUT, R).sum(1)
    G_b = g_b + h.unsqueeze(1)
    assert close((g_b + torch.einsum("tbi,bij->tbj", G_b, D)).flatten(1)[:, :IN], dx)
    assert close(torch.einsum("tbi,tbj->bij", G_b, shards_of(x)), dD)


def test_the_gradients_of_bat_col():
    x, W, D, g_y, dx, dW, dD = gradients("bat-col")
    G, eye = g_y.T @ x, torch.eye(R, dtype=torch.float64)
    assert close(g_y @ (W + reference.delta("bat-col", W, D)), dx)
    for a in range(N_OUT):
        summands = [(block(W, a, b).T + eye) @ block(G, a, b) for b in range(N_IN)]
        assert close(torch.stack(summands).sum(0), dD[a])
        for b in range(N_IN):
            want = block(dW, a, b)
            got = block(G, a, b) @ (eye + D[a].T)
            shape = min(R, OUT - a * R), min(R, IN - b * R)
            assert close(got[: shape[0], : shape[1]], want[: shape[0], : shape[1]])


def test_the_gradients_of_orthogonal():
    x, W, P, g_y, dx, _, dP = gradients("orthogonal")
    Q, g = reference.rotation(P), g_y @ W
    g_b, x_b = shards_of(g)[:, :-1], shards_of(x)[:, :-1]
    assert close(torch.cat([(g_b @ Q).flatten(1), g[:, -2:]], 1), dx)
    dQ = torch.einsum("tbi,tbj->ij", g_b, x_b)
    leaf = P.clone().requires_grad_()
    assert close(torch.autograd.grad(reference.rotation(leaf), leaf, dQ)[0], dP)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_what_is_said_of_the_cayley_map(eps):
    P, dP = torch.randn(2, 5, 5, dtype=torch.float64) * 3
    A, dA, eye = P - P.T, dP - dP.T, torch.eye(5, dtype=torch.float64)
    inverse, Q = torch.linalg.inv((1 + eps) * eye - A), reference.rotation(P, eps)
    assert close((1 + eps) * inverse @ (eye + A), Q)
    assert close((2 + eps) * inverse @ A, Q - eye)
    assert close(rotation_offset(P, True, eps), Q - eye)
    assert close((eye + (Q - eye) / (2 + eps)) / (1 + eps), inverse)
    turning = jvp(lambda P: reference.rotation(P, eps), P, dP)[1]
    assert isinstance(turning, torch.Tensor)
    assert close((2 + eps) * (1 + eps) * inverse @ dA @ inverse, turning)
    assert torch.linalg.matrix_norm(inverse, 2) <= 1 / (1 + eps) + 1e-12
    assert torch.linalg.matrix_norm(Q - eye, 2) <= 2 + eps
    assert (Q.T @ Q - eye).abs().max() <= 2 * eps + eps**2
    pairs = sorted(a for a in torch.linalg.eigvals(A).imag.tolist() if a > 1e-9)
    turned = sorted((q for q in torch.linalg.eigvals(Q).tolist() if q.imag > 1e-9), key=cmath.phase)
    assert len(turned) == len(pairs) == 2
    for q, a in zip(turned, pairs, strict=True):
        assert math.isclose(cmath.phase(q), math.atan(a) + math.atan(a / (1 + eps)), rel_tol=1e-9)
        assert math.isclose(abs(q) ** 2, (1 + eps) ** 2 * (1 + a * a) / ((1 + eps) ** 2 + a * a), rel_tol=1e-9)


def test_two_bone_adapters_are_one_of_a_common_multiple():
    W = torch.zeros(OUT, IN, dtype=torch.float64)
    one, two = (random_block("bone", OUT, IN, r) for r in (2, 3))
    total = reference.delta("bone", W, one) + reference.delta("bone", W, two)
    assert close(reference.delta("bone", W, one.repeat(3, 1) + two.repeat(2, 1)), total)


def test_convolutions_and_embeddings_are_the_linear_layer_that_the_page_says():
    x, kernel = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.randn(OUT, 3, 3, 3, dtype=torch.float64)
    W, B = kernel.flatten(1), random_block("bone", OUT, 27, R)
    patches = unfold(x, 3).mT  # feature c k^2 + i k + j
    assert close(patches @ W.T, conv2d(x, kernel).flatten(2).mT)
    K = torch.stack([(torch.arange(27) % R == m).double() for m in range(R)]).view(R, 3, 3, 3)
    factored = conv2d(x, kernel).flatten(2).mT + conv2d(x, K).flatten(2).mT @ B
    assert close(factored, patches @ (W + reference.delta("bone", W, B)).T)
    ids, table = torch.tensor([0, 3, 4, 13]), torch.randn(IN, OUT, dtype=torch.float64)
    B = random_block("bone", OUT, IN, R)
    assert close(embedding(ids, table) + B[ids % R], embedding(ids, (table.T + reference.delta("bone", table.T, B)).T))


@pytest.mark.parametrize("name", ["bat-row", "bat-col", "orthogonal"])
def test_a_merge_is_solved_for(name):
    W, trained = torch.randn(OUT, IN, dtype=torch.float64), random_block(name, OUT, IN, R)
    merged, eye = W + reference.delta(name, W, trained), torch.eye(R, dtype=torch.float64)
    for a, b in itertools.product(range(N_OUT), range(N_IN)):
        rows, columns = min(R, OUT - a * R), min(R, IN - b * R)
        if name != "orthogonal":
            D = trained[a if name == "bat-col" else b]
            # Of a ragged input shard only the rows and columns that exist take part.
            found = (block(merged, a, b) - D)[:, :columns] @ torch.linalg.inv((eye + D)[:columns, :columns])
        elif columns == R:
            found = block(merged, a, b) @ torch.linalg.inv(reference.rotation(trained))
        else:
            found = block(merged, a, b)[:, :columns]
        assert close(found[:rows], block(W, a, b)[:rows, :columns])
