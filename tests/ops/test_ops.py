"""Every variant's moves and delta against the fp64 oracle: outputs and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbone import variants
from flashbone.ops.bat_col import bat_col_linear
from flashbone.ops.bat_row import shift_input
from flashbone.ops.moves import Moves
from flashbone.ops.rotation import rotate_input
from flashbone.shards import shard_sum
from helpers import reference
from helpers.blocks import CASES, VARIANT_NAMES, adapted, random_block
from helpers.comparison import close, relative_error


def layer(out: int, in_: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(out, in_, dtype=dtype) / in_**0.5, torch.randn(out, dtype=dtype)


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_output_and_gradients_equal_the_oracle(name, size):
    out, in_, _r = size
    W, bias = layer(out, in_)
    leaves = [torch.randn(2, 5, in_, dtype=torch.float64), W, bias, random_block(name, *size)]
    results = []
    for run in (adapted, reference.forward):
        x, W, bias, block = (t.clone().requires_grad_() for t in leaves)
        y = run(x, W, bias, [(name, block, 0.7)])
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, W, bias, block])])
    for got, want in zip(*results, strict=True):
        assert close(got, want)


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_delta_equals_the_oracle(name, size):
    W, block = layer(*size[:2])[0], random_block(name, *size)
    assert close(variants.get(name).delta(W, block), reference.delta(name, W, block))


@pytest.mark.parametrize(("name", "size"), [c for c in CASES if c[1] in [(8, 12, 4), (11, 13, 4), (5, 3, 8)]], ids=str)
def test_gradcheck_in_fp64(name, size):
    out, in_, _ = size
    W, bias = layer(out, in_)
    x = torch.randn(3, in_, dtype=torch.float64, requires_grad=True)
    block = random_block(name, *size).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, block: adapted(x, W, bias, [(name, block, 1.3)]), (x, block))


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_base_weight_and_bias_can_be_trained_along(name):
    W, bias = (t.requires_grad_() for t in layer(11, 13))
    x, block = torch.randn(3, 13, dtype=torch.float64), random_block(name, 11, 13, 4)
    assert torch.autograd.gradcheck(lambda W, bias: adapted(x, W, bias, [(name, block, 1.3)]), (W, bias))


@pytest.mark.parametrize("name", VARIANT_NAMES)
@pytest.mark.parametrize("shape", [(13,), (0, 13), (2, 0, 13), (7, 13), (2, 3, 13), (2, 1, 3, 13)], ids=str)
def test_any_number_of_batch_axes_also_empty_ones(name, shape):
    W, bias = layer(11, 13)
    x, block = torch.randn(shape, dtype=torch.float64, requires_grad=True), random_block(name, 11, 13, 4)
    y = adapted(x, W, bias, [(name, block, 1.0)])
    assert close(y, reference.forward(x, W, bias, [(name, block, 1.0)]))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def strided_inputs(in_: int):
    base = torch.randn(6, 4, 2 * in_, dtype=torch.float64)
    yield base[..., ::2]
    yield base[..., :in_].transpose(0, 1)
    yield base[::2, :, in_:]
    yield torch.randn(in_, 6, dtype=torch.float64).T
    yield torch.randn(1, 1, in_, dtype=torch.float64).expand(3, 4, in_)


@pytest.mark.parametrize("in_", [12, 13])
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_strided_inputs_and_strided_gradients(name, in_):
    W, bias = layer(11, in_)
    block = random_block(name, 11, in_, 4)
    for x in strided_inputs(in_):
        results = []
        for run in (adapted, reference.forward):
            leaf, B = x.detach().requires_grad_(), block.clone().requires_grad_()
            y = run(leaf, W, bias, [(name, B, 1.0)])
            grad = torch.arange(y.numel(), dtype=y.dtype).view(y.shape[::-1]).permute(*reversed(range(y.ndim)))
            results.append([y, *torch.autograd.grad(y, [leaf, B], grad)])
        for got, want in zip(*results, strict=True):
            assert close(got, want)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_a_transposed_weight_as_conv1d_has_it(name):
    W, bias = layer(13, 11)[0], torch.randn(11, dtype=torch.float64)
    x, block = torch.randn(3, 13, dtype=torch.float64), random_block(name, 11, 13, 4)
    assert close(adapted(x, W.T, bias, [(name, block, 1.0)]), reference.forward(x, W.T, bias, [(name, block, 1.0)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_low_precision_keeps_dtypes_and_stays_near_the_oracle(name, dtype):
    out, in_, r = 66, 130, 16
    W, bias = layer(out, in_, dtype)
    block = random_block(name, out, in_, r, dtype=torch.float32, std=0.05).requires_grad_()
    x = torch.randn(5, in_, dtype=dtype, requires_grad=True)
    y = adapted(x, W, bias, [(name, block, 1.0)])
    want_block = block.detach().double().requires_grad_()
    want = reference.forward(x.detach(), W, bias, [(name, want_block, 1.0)])
    assert y.dtype == dtype
    assert close(y, want, dtype)
    y.float().square().sum().backward()
    want.square().sum().backward()
    assert block.grad is not None
    assert block.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert close(block.grad, want_block.grad, dtype)


@pytest.mark.parametrize("in_", [4096 * 4, 4096 * 4 + 3])
def test_shard_sums_of_bf16_are_rounded_a_few_times_only_and_of_fp16_not_at_all(in_):
    x = torch.randn(16, in_).bfloat16()
    # One rounding is 1.1e-3 (RMS), a CPU's sum 2.0e-3; an accumulator in bf16 is off by tens of percent.
    assert relative_error(shard_sum(x, 4), shard_sum(x.double(), 4)) < 4 * 2**-9
    assert close(shard_sum(x.half(), 4), shard_sum(x.half().double(), 4), torch.float32)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("size", [(8, 4), (7, 9)])
def test_gradcheck_of_several_weight_shifts_at_once(size, with_base):
    out, in_ = size
    W, bias = (t.requires_grad_() for t in layer(out, in_))
    x = torch.randn(2, in_, dtype=torch.float64, requires_grad=True)
    blocks = [random_block("bat-col", out, in_, r).requires_grad_() for r in (4, 2, 4)]
    assert torch.autograd.gradcheck(
        lambda x, W, bias, *D: bat_col_linear(x, W, bias, D, with_base), (x, W, bias, *blocks)
    )


@pytest.mark.parametrize(
    "names",
    [
        ("bone", "bat-col", "bat-row"),
        ("bat-row", "mini", "bat-col", "bat-col", "bone"),
        ("orthogonal", "bat-row", "orthogonal", "bat-col", "mini"),
    ],
)
def test_adapters_active_at_once_are_the_sum_of_their_deltas_in_any_order(names):
    out, in_ = 11, 13
    W, bias = layer(out, in_)
    x = torch.randn(3, in_, dtype=torch.float64)
    adapters = [(name, random_block(name, out, in_, 2 + i), 0.5 + i) for i, name in enumerate(names)]
    want = reference.forward(x, W, bias, adapters)
    assert close(adapted(x, W, bias, adapters), want)
    assert close(adapted(x, W, bias, adapters[::-1]), want)
    assert close(x @ variants.merged_weight(W, [(variants.get(n), b, s) for n, b, s in adapters]).T + bias, want)


@pytest.mark.parametrize("in_", [12, 13])
@pytest.mark.parametrize("names", [("bat-row", "bat-row"), ("orthogonal", "orthogonal"), ("bat-row", "orthogonal")])
def test_gradients_of_input_shifts_on_top_of_each_other_equal_the_oracle(names, in_):
    W, bias = layer(11, in_)
    leaves = [torch.randn(5, in_, dtype=torch.float64), *(random_block(n, 11, in_, 3 + i) for i, n in enumerate(names))]
    results = []
    for run in (adapted, reference.forward):
        x, *blocks = (t.clone().requires_grad_() for t in leaves)
        y = run(x, W, bias, [(n, b, 0.7) for n, b in zip(names, blocks, strict=True)])
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *blocks])])
    for got, want in zip(*results, strict=True):
        assert close(got, want)


@pytest.mark.parametrize("composite", [True, False])
@pytest.mark.parametrize("in_", [12, 13])
@pytest.mark.parametrize("shift", [shift_input, rotate_input])
def test_gradcheck_of_an_input_shift_of_another_input_than_the_base_s(shift, in_, composite):
    x, base_x = (torch.randn(3, in_, dtype=torch.float64, requires_grad=True) for _ in range(2))
    block = random_block("bat-row" if shift is shift_input else "orthogonal", 8, in_, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda *tensors: shift(*tensors, composite), (x, block, base_x))
    assert torch.autograd.gradcheck(lambda x, block: shift(x, block, None, composite), (x, block))
    for frozen in (x, block, base_x):  # only what is needed is computed, and it is the same
        needed = [t for t in (x, block, base_x) if t is not frozen]
        grads = []
        for leaves in ((x, block, base_x), tuple(t.detach() if t is frozen else t for t in (x, block, base_x))):
            y = shift(*leaves, composite)
            grads.append(torch.autograd.grad((y[0] if shift is shift_input else y).sin().sum(), needed))
        assert all(map(close, *grads))


@pytest.mark.parametrize("name", ["bone", "mini", "bat-row", "orthogonal"])
def test_the_weight_is_read_by_bat_col_only(name):
    moves_only = random_block(name, 8, 12, 4)

    def weight():
        raise AssertionError("the weight was read")

    moves = Moves(torch.randn(2, 12, dtype=torch.float64))
    variants.get(name).move(moves, moves.x, moves_only, 1.0)
    assert moves.run(lambda x: x[..., :8], weight).shape == (2, 8)
    assert not variants.get(name).reads_weight


def saved_bytes(run) -> int:
    """Bytes of distinct storage that autograd keeps for backward while `run` executes."""
    storages: dict[int, int] = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep = run()
    del keep
    return sum(storages.values())


@pytest.mark.parametrize("in_", [512, 500])
def test_what_is_kept_for_backward(in_):
    tokens, out, r = 256, 384, 16
    W, x = torch.randn(out, in_), torch.randn(tokens, in_, requires_grad=True)
    kept = {}
    for name in VARIANT_NAMES:
        block = random_block(name, out, in_, r, dtype=torch.float32).requires_grad_()
        kept[name] = saved_bytes(lambda name=name, block=block: adapted(x, W, None, [(name, block, 1.0)])) / 4
        kept[name] -= W.numel() + block.numel()
    assert kept["bone"] == tokens * r
    assert kept["mini"] == tokens * r
    assert kept["bat-row"] == tokens * in_
    assert kept["orthogonal"] == tokens * in_  # and Q - I in the place of the block
    assert kept["bat-col"] == tokens * in_


def block_size(name: str, in_: int, r: int) -> int:
    return min(r, in_) if name == "orthogonal" else r


@given(
    out=st.integers(1, 20),
    in_=st.integers(1, 20),
    r=st.integers(1, 24),
    names=st.lists(st.sampled_from(VARIANT_NAMES), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_any_mix_of_variants_and_sizes_equals_the_oracle(out, in_, r, names, seed):
    torch.manual_seed(seed)
    W, bias = layer(out, in_)
    x = torch.randn(2, in_, dtype=torch.float64)
    adapters = [
        (n, random_block(n, out, in_, block_size(n, in_, 1 + (r * i) % 24), mini_r=1 + i), 1 - i / 3)
        for i, n in enumerate(names, 1)
    ]
    assert close(adapted(x, W, bias, adapters), reference.forward(x, W, bias, adapters))
