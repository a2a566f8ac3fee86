"""The Triton kernels against plain loops in fp64: outputs and every gradient, in the interpreter or on a GPU."""

import pytest

pytest.importorskip("triton", reason="triton is not installed here; `make test-triton` brings it")

import torch
import torch.nn.functional as F
from torch import Tensor

from flashbone import variants
from flashbone.errors import BackendError, ShapeError
from flashbone.ops.moves import Moves
from flashbone.ops.triton import launch, shard_sum, shift_input
from helpers import reference
from helpers.blocks import SIZES, random_block
from helpers.comparison import close

pytestmark = pytest.mark.skipif(
    not (launch.INTERPRETED or torch.cuda.is_available()),
    reason="needs a GPU, or TRITON_INTERPRET=1 (make test-triton)",
)
DEVICE = "cpu" if launch.INTERPRETED else "cuda"
LOW = [torch.float32, torch.bfloat16, torch.float16]

# (in, r): those of the other ops; blocks of one tile, of several, larger than the layer; ragged ones
LARGE = [(64, 16), (130, 16), (192, 64), (200, 96), (512, 256), (600, 256), (40, 300)]
FEATURES = sorted({(in_, r) for _, in_, r in SIZES}) + LARGE


def sum_by_loops(x: Tensor, r: int, divisor: int = 1) -> Tensor:
    """S(x) / divisor in fp64, shard by shard."""
    padded = F.pad(x.double(), (0, -x.shape[-1] % r))
    return sum(padded[..., b : b + r] for b in range(0, padded.shape[-1], r)) / divisor


def shift_by_loops(base_x: Tensor, x: Tensor, D: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """bat-row's two shifts in fp64, shard by shard."""
    r = D.shape[-1]
    padded = F.pad(x.double(), (0, -x.shape[-1] % r))
    z = [scale * (padded[..., b * r : b * r + r] @ D[b].double().T) for b in range(D.shape[0])]
    return base_x.double() + torch.cat(z, -1)[..., : x.shape[-1]], sum(z)


def random_blocks(in_: int, r: int, dtype=torch.float64) -> Tensor:
    return (torch.randn(-(-in_ // r), r, r, dtype=torch.float64) / r**0.5).to(dtype).to(DEVICE)


def results(run, *leaves: Tensor) -> list[Tensor]:
    """Outputs of `run`, and the gradient of each leaf under uneven weights of the outputs."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    outputs = [y for y in run(*leaves) if y is not None]
    loss = sum((y.double() * torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("divisor", [1, 8, 3])
@pytest.mark.parametrize("size", FEATURES, ids=str)
def test_shard_sum_and_its_gradient_equal_the_loops(size, divisor):
    in_, r = size
    x = torch.randn(2, 3, in_, dtype=torch.float64, device=DEVICE)
    got = results(lambda x: [shard_sum(x, r, divisor)], x)
    for value, want in zip(got, results(lambda x: [sum_by_loops(x, r, divisor)], x), strict=True):
        assert close(value, want)


@pytest.mark.parametrize("size", [(4100, 1), (4100, 4), (5000, 1500)], ids=str)
def test_shard_sums_of_many_shards_and_of_wide_ones(size):
    in_, r = size
    x = torch.randn(3, in_, device=DEVICE)
    assert close(shard_sum(x, r), sum_by_loops(x, r))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shard_sums_are_rounded_once(dtype):
    x = torch.randn(4, 4096 * 4 + 3, device=DEVICE).to(dtype)
    got, exact = shard_sum(x, 4), sum_by_loops(x, 4)
    # The interpreter cuts bf16 off where a GPU rounds to nearest.
    roundings = 1.0 if launch.INTERPRETED and dtype == torch.bfloat16 else 0.5
    assert got.dtype == dtype
    assert ((got - exact).abs() <= roundings * torch.finfo(dtype).eps * exact.abs() + 2e-4).all()


def test_a_divisor_keeps_sums_of_fp16_in_range():
    x = torch.full((2, 1024), 1000.0, dtype=torch.float16, device=DEVICE)
    assert (shard_sum(x, 4, 256) == 1000).all()


@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("size", FEATURES, ids=str)
def test_shift_and_its_gradients_equal_the_loops(size, with_sum):
    in_, r = size
    base_x, x = torch.randn(2, 2, 5, in_, dtype=torch.float64, device=DEVICE)
    D = random_blocks(in_, r)
    got = results(lambda base_x, x, D: shift_input(base_x, x, D, 0.7, with_sum), base_x, x, D)
    want = results(lambda base_x, x, D: shift_by_loops(base_x, x, D, 0.7)[: 1 + with_sum], base_x, x, D)
    for value, expected in zip(got, want, strict=True):
        assert close(value, expected)


@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("size", [(12, 4), (13, 4), (130, 16)], ids=str)
def test_a_shift_of_x_itself_adds_both_gradients(size, with_sum):
    x, D = torch.randn(7, size[0], dtype=torch.float64, device=DEVICE), random_blocks(*size)
    got = results(lambda x, D: shift_input(x, x, D, -1.3, with_sum), x, D)
    want = results(lambda x, D: shift_by_loops(x, x, D, -1.3)[: 1 + with_sum], x, D)
    for value, expected in zip(got, want, strict=True):
        assert close(value, expected)


@pytest.mark.parametrize("size", [(7, 3), (3, 5)], ids=str)
def test_gradcheck_in_fp64(size):
    base_x, x = torch.randn(2, 2, size[0], dtype=torch.float64, device=DEVICE)
    D = random_blocks(*size)
    leaves = [t.clone().requires_grad_() for t in (base_x, x, D)]
    assert torch.autograd.gradcheck(lambda base_x, x, D: shift_input(base_x, x, D, 1.3), leaves)
    assert torch.autograd.gradcheck(lambda x, D: shift_input(x, x, D, 1.3, with_sum=False)[0], leaves[1:])
    assert torch.autograd.gradcheck(lambda x: shard_sum(x, size[1], 2), leaves[1:2])
    assert torch.autograd.gradgradcheck(lambda x: shard_sum(x, size[1], 2), leaves[1:2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("size", [(8, 12, 4), (11, 13, 4), (5, 3, 8)], ids=str)
@pytest.mark.parametrize("name", ["bone", "mini", "bat-row"])
def test_a_layer_with_this_backend_equals_the_oracle(name, size, dtype):
    W, x = torch.randn(size[:2]).to(dtype), torch.randn(2, 3, size[1]).to(dtype)
    block = random_block(name, *size)
    want = results(lambda x, block: [reference.forward(x, W, None, [(name, block, 0.7)])], x, block)

    def layer(x, block):
        moves = Moves(x, backend_name="triton")
        variants.get(name).move(moves, x, block, 0.7)
        return [moves.run(lambda x: F.linear(x, W.to(DEVICE)), lambda: (W, None))]

    got = results(layer, x.to(DEVICE), block.to(DEVICE))
    for value, expected in zip(got, want, strict=True):
        assert close(value.cpu(), expected, dtype)


@pytest.mark.parametrize("size", [(130, 16), (192, 64), (200, 96), (600, 256)], ids=str)
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_keeps_dtypes_and_stays_near_the_loops(dtype, size):
    x, D = torch.randn(5, size[0], device=DEVICE).to(dtype), random_blocks(*size, dtype=torch.float32)
    got = results(lambda x, D: shift_input(x, x, D, 0.7), x, D)
    want = results(lambda x, D: shift_by_loops(x, x, D, 0.7), x, D)
    assert [value.dtype for value in got] == [dtype, dtype, dtype, torch.float32]
    for value, expected in zip(got, want, strict=True):
        assert close(value, expected, dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_more_tokens_than_one_program_takes(dtype):
    x, D = torch.randn(2600, 24, device=DEVICE).to(dtype), random_blocks(24, 8, torch.float32)
    config = launch.shift_config(2600, 8, dtype, True, False, True)
    assert config["BLOCK_M"] > 16
    assert 2600 % config["BLOCK_M"]
    for value, expected in zip(shift_input(x, x, D, 1.0), shift_by_loops(x, x, D, 1.0), strict=True):
        assert close(value, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_wrong_blocks_are_told_apart(dtype):
    x, D = torch.randn(5, 48, device=DEVICE).to(dtype), random_blocks(48, 16, dtype=torch.float64)
    got = shift_input(x, x, D.to(dtype), 1.0)
    for wrong in (D.flip(0), D.mT, -D, 1.05 * D):
        assert not any(close(*pair, dtype) for pair in zip(got, shift_by_loops(x, x, wrong, 1.0), strict=True))


@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_one_block_expanded_over_the_shards(dtype, with_sum, monkeypatch):
    x, block = torch.randn(5, 70, device=DEVICE).to(dtype), random_blocks(16, 16, dtype=torch.float64)
    scaled, strides = launch._scaled, []
    monkeypatch.setattr(launch, "_scaled", lambda *a: strides.append(scaled(*a).stride(0)) or scaled(*a))
    got = results(lambda x, P: shift_input(x, x, P.expand(5, 16, 16), 0.7, with_sum), x, block)
    want = results(lambda x, P: shift_by_loops(x, x, P.expand(5, 16, 16), 0.7)[: 1 + with_sum], x, block)
    assert strides == [0, 0]
    for value, expected in zip(got, want, strict=True):
        assert close(value, expected, dtype)


@pytest.mark.parametrize("shape", [(13,), (0, 13), (2, 0, 13), (7, 13), (2, 3, 13), (2, 1, 3, 13)], ids=str)
def test_any_number_of_batch_axes_also_empty_ones(shape):
    x, D = torch.randn(shape, dtype=torch.float64, device=DEVICE), random_blocks(13, 4)
    got = results(lambda x, D: [*shift_input(x, x, D, 1.0), shard_sum(x, 4)], x, D)
    want = results(lambda x, D: [*shift_by_loops(x, x, D, 1.0), sum_by_loops(x, 4)], x, D)
    for value, expected in zip(got, want, strict=True):
        assert close(value, expected)


def strided_inputs(in_: int):
    base = torch.randn(6, 4, 2 * in_, dtype=torch.float64, device=DEVICE)
    yield base[..., ::2]
    yield base[..., :in_].transpose(0, 1)
    yield base[::2, :, in_:]
    yield torch.randn(in_, 6, dtype=torch.float64, device=DEVICE).T
    yield torch.randn(1, 1, in_, dtype=torch.float64, device=DEVICE).expand(3, 4, in_)


@pytest.mark.parametrize("in_", [12, 13, 1])
def test_strided_inputs_and_strided_gradients(in_):
    D = random_blocks(in_, 4)
    for x in strided_inputs(in_):
        compared = []
        for shift, total in ((shift_input, shard_sum), (shift_by_loops, sum_by_loops)):
            leaves = x.detach().requires_grad_(), D.clone().requires_grad_()
            outputs = [*shift(leaves[0], *leaves, 1.0), total(leaves[0], 4)]
            grads = [
                torch.arange(y.numel(), dtype=y.dtype, device=DEVICE).view(y.shape[::-1]).permute(*range(y.ndim)[::-1])
                for y in outputs
            ]
            compared.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
        for got, want in zip(*compared, strict=True):
            assert close(got, want)


def test_rows_of_a_view_are_not_copied():
    x = torch.randn(2, 3, 24, device=DEVICE)[..., :12]
    assert launch._rows(x).data_ptr() == x.data_ptr()
    assert launch._rows(x).stride() == (24, 1)


def test_gradients_of_single_outputs_and_of_single_inputs():
    base_x, x = torch.randn(2, 5, 13, dtype=torch.float64, device=DEVICE)
    D = random_blocks(13, 4)
    for only in (slice(0, 1), slice(1, 2)):
        got = results(lambda x, D, only=only: shift_input(base_x, x, D, 1.0)[only], x, D)
        want = results(lambda x, D, only=only: shift_by_loops(base_x, x, D, 1.0)[only], x, D)
        for value, expected in zip(got, want, strict=True):
            assert close(value, expected)
    for wanted in range(3):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate((base_x, x, D))]
        shift_input(*leaves, 1.0)[0].sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]


@pytest.mark.parametrize("in_", [512, 500])
def test_what_is_kept_for_backward(in_):
    x, D = (
        torch.randn(64, in_, device=DEVICE, requires_grad=True),
        random_blocks(in_, 16, torch.float32).requires_grad_(),
    )
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = shard_sum(x, 16), shift_input(x, x, D, 0.5)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), D.data_ptr()}
    del outputs


def test_autocast_changes_nothing():
    x, D = torch.randn(6, 40, device=DEVICE), random_blocks(40, 16, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = results(lambda x, D: [*shift_input(x, x, D, 0.5), shard_sum(x, 16)], x, D)
    want = results(lambda x, D: [*shift_by_loops(x, x, D, 0.5), sum_by_loops(x, 16)], x, D)
    for value, expected in zip(got, want, strict=True):
        assert close(value, expected, torch.float32)


def test_wrong_sizes_are_named():
    x = torch.randn(3, 13, device=DEVICE)
    with pytest.raises(ShapeError, match=r"wanted .* D of \(4, 4, 4\)"):
        shift_input(x, x, random_blocks(12, 4, torch.float32), 1.0)
    with pytest.raises(ShapeError, match="both must be positive"):
        shard_sum(x, 0)
    with pytest.raises(ShapeError, match="divisor must be positive"):
        shard_sum(x, 4, 0)


def test_an_unknown_dtype_is_named():
    with pytest.raises(BackendError, match="float8_e5m2"):
        shard_sum(torch.zeros(3, 8, device=DEVICE).to(torch.float8_e5m2), 4)
