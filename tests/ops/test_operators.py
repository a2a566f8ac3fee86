"""The operators registered with torch, and what surrounds them: second derivatives, torch.func, work in place."""

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from flashbone import variants
from flashbone.ops.autocast import without_autocast
from flashbone.ops.moves import Moves
from flashbone.ops.tiles import add_tiles
from helpers import reference
from helpers.blocks import VARIANT_NAMES, adapted, random_block
from helpers.comparison import Promise, close, same_bits

OUT, IN = 11, 13


def tensors(*names: str, r: int = 4):
    W, bias = torch.randn(OUT, IN, dtype=torch.float64) / IN**0.5, torch.randn(OUT, dtype=torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64)
    return x, W, bias, [random_block(name, OUT, IN, r) for name in names]


OPCHECKS = pytest.mark.parametrize(
    "checks",
    [
        ("test_schema", "test_autograd_registration", "test_faketensor"),
        pytest.param(("test_aot_dispatch_dynamic",), marks=pytest.mark.slow),
    ],
    ids=["eager", "compiled"],
)


@OPCHECKS
@pytest.mark.parametrize("in_", [12, 13])
@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_opcheck_of_the_input_shift(in_, has_base, strided, checks):
    shape = (in_, 3) if strided else (3, in_)
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    x, base_x = (leaf.T.detach().requires_grad_() if strided else leaf for leaf in leaves)
    D = random_block("bat-row", 8, in_, 4, dtype=torch.float32).requires_grad_()
    arguments = (x, D, base_x if has_base else None)
    checked = torch.library.opcheck(torch.ops.flashbone.shift_input.default, arguments, test_utils=checks)
    assert set(checked.values()) == {"SUCCESS"}
    plain = [t.detach() for t in (x, base_x, x, D)]
    plain[1] = torch.randn(3, 4)
    for need in ((True, True), (False, True), (True, False)):
        checked = torch.library.opcheck(
            torch.ops.flashbone.shift_input_backward.default, (*plain, not has_base, *need), test_utils=checks
        )
        assert set(checked.values()) == {"SUCCESS"}


@OPCHECKS
@pytest.mark.parametrize("in_", [12, 13])
@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_opcheck_of_the_rotation(in_, has_base, strided, checks):
    shape = (in_, 3) if strided else (3, in_)
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    x, base_x = (leaf.T.detach().requires_grad_() if strided else leaf for leaf in leaves)
    E = torch.randn(4, 4, requires_grad=True)
    arguments = (x, E, base_x if has_base else None)
    checked = torch.library.opcheck(torch.ops.flashbone.rotate_input.default, arguments, test_utils=checks)
    assert set(checked.values()) == {"SUCCESS"}
    for need in ((True, True), (False, True), (True, False)):
        arguments = (base_x.detach(), x.detach(), E.detach(), not has_base, *need)
        op = torch.ops.flashbone.rotate_input_backward.default
        checked = torch.library.opcheck(op, arguments, test_utils=checks)
        assert set(checked.values()) == {"SUCCESS"}


@OPCHECKS
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_opcheck_of_the_weight_shift(with_base, has_bias, checks):
    x, W, bias = (torch.randn(shape, requires_grad=True) for shape in ((3, IN), (OUT, IN), (OUT,)))
    blocks = [random_block("bat-col", OUT, IN, r, dtype=torch.float32).requires_grad_() for r in (4, 3)]
    op = torch.ops.flashbone.bat_col_linear
    checked = torch.library.opcheck(
        op.default, (x, W, bias if has_bias else None, blocks, with_base), test_utils=checks
    )
    assert set(checked.values()) == {"SUCCESS"}
    plain = [torch.randn(3, OUT), x.detach(), W.detach(), [D.detach() for D in blocks], with_base]
    each_alone = [[i == j for i in range(5)] for j in range(5)]
    for need in ([True] * 5, [False, False, True, False, True], *each_alone):
        checked = torch.library.opcheck(
            torch.ops.flashbone.bat_col_linear_backward.default, (*plain, need), test_utils=checks
        )
        assert set(checked.values()) == {"SUCCESS"}
        got = torch.ops.flashbone.bat_col_linear_backward(*plain, need)
        whole = torch.ops.flashbone.bat_col_linear_backward(*plain, [True] * 5)
        assert [g.numel() > 0 for g in got] == need
        assert all(same_bits(g, w, Promise.SAME_PRODUCT) for g, w in zip(got, whole, strict=True) if g.numel())


@pytest.mark.parametrize(
    "names",
    [
        *((name,) for name in VARIANT_NAMES),
        pytest.param(("bat-row", "bone", "bat-col", "mini", "orthogonal"), marks=pytest.mark.slow),
    ],
)
def test_second_derivatives_in_fp64(names):
    x, W, bias, blocks = tensors(*names)

    def run(x, *blocks):
        return adapted(x, W, bias, [(n, b, 0.7) for n, b in zip(names, blocks, strict=True)]).sin()

    leaves = [t.requires_grad_() for t in (x, *blocks)]
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_second_derivatives_of_a_weight_that_is_trained_along(name):
    x, W, bias, (block,) = tensors(name)
    leaves = [t.requires_grad_() for t in (W, bias, block)]
    assert torch.autograd.gradgradcheck(lambda W, bias, D: adapted(x, W, bias, [(name, D, 1.3)]).sin(), leaves)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_gradients_of_each_sample_and_ensembles_of_adapters_by_torch_func(name):
    x, W, bias, (block,) = tensors(name)

    def loss(block, x):
        return adapted(x.unsqueeze(0), W, bias, [(name, block, 1.0)]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(block, x)
    blocks = torch.stack([block, -2 * block])
    several = torch.func.vmap(lambda block: adapted(x, W, bias, [(name, block, 1.0)]))(blocks)
    for i in range(len(x)):
        leaf = block.clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(leaf, x[i]), leaf)
        assert close(each[i], want)
    for i in range(2):
        assert close(several[i], reference.forward(x, W, bias, [(name, blocks[i], 1.0)]))


@pytest.mark.parametrize("names", [("bone", "mini"), ("bone", "bat-row", "mini"), ("bat-col", "mini", "mini")])
def test_ensembles_of_several_adapters_at_once_by_torch_func(names):
    x, W, bias, blocks = tensors(*names)

    def run(*blocks):
        return adapted(x, W, bias, list(zip(names, blocks, (0.5, -1.0, 2.0), strict=False)))

    stacks = [torch.stack([block, -2 * block]) for block in blocks]
    want = [
        reference.forward(x, W, bias, list(zip(names, of_one, (0.5, -1.0, 2.0), strict=False)))
        for of_one in zip(*stacks, strict=True)
    ]
    assert close(torch.func.vmap(run)(*stacks), torch.stack(want))


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_two_adapters_of_one_variant_may_differ_in_size(name):
    x, W, bias, (first,) = tensors(name)
    for second in (random_block(name, OUT, IN, 3), random_block(name, OUT, IN, 4, mini_r=2)):
        adapters = [(name, first, 0.5), (name, second, -1.5), (name, 2 * first, 1.0)]
        assert close(adapted(x, W, bias, adapters), reference.forward(x, W, bias, adapters))


@pytest.mark.parametrize("first", VARIANT_NAMES)
@pytest.mark.parametrize("second", VARIANT_NAMES)
def test_each_adapter_sees_its_own_input_as_dropout_gives_it(first, second):
    x, W, bias, blocks = tensors(first, second)
    moves, want = Moves(x), linear(x, W, bias)
    for name, block, seen in zip((first, second), blocks, (2 * x.flip(0), x * (x > 0)), strict=True):
        variants.get(name).move(moves, seen, block, 0.7)
        want = want + 0.7 * seen @ reference.delta(name, W, block).T
    assert close(moves.run(lambda base_x: linear(base_x, W, bias), lambda: (W, bias)), want)


@pytest.mark.parametrize("name", VARIANT_NAMES)
@pytest.mark.parametrize("own", [True, False])
def test_an_output_that_is_not_ours_is_left_as_it_was(name, own):
    x, W, bias, (block,) = tensors(name)
    moves = Moves(x)
    variants.get(name).move(moves, x, block, 1.0)
    base_x = moves.begin()
    y = linear(x if base_x is None else base_x, W, bias)
    before = y.clone()
    assert close(moves.finish(y, lambda: (W, bias), own), reference.forward(x, W, bias, [(name, block, 1.0)]))
    assert same_bits(y, before, Promise.UNTOUCHED) == (not own or name == "orthogonal")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, for addmm
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_forward_mode_and_meta_tensors(name):
    x, W, bias, (block,) = tensors(name)

    def run(x):
        return adapted(x, W, bias, [(name, block, 1.0)])

    want = run(x)
    direction = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        _, tangent = torch.autograd.forward_ad.unpack_dual(run(torch.autograd.forward_ad.make_dual(x, direction)))
    assert close(tangent, run(direction) - run(torch.zeros_like(x)))
    W, bias, block = W.to("meta"), bias.to("meta"), block.to("meta")
    assert run(x.to("meta")).shape == want.shape


class Calls(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_ten_adapters_of_one_size_cost_one_product(name):
    x, W, bias, blocks = tensors(*[name] * 10)
    counts = []
    for used in (blocks[:1], blocks):
        adapters = [(name, block, 0.5 + i) for i, block in enumerate(used)]
        with Calls() as calls:
            y = adapted(x, W, bias, adapters)
        assert close(y, reference.forward(x, W, bias, adapters))
        heavy = ("mm", "addmm", "addmm_", "bmm", "shift_input", "rotate_input", "bat_col_linear", "sum", "linear")
        counts.append([n for n in calls.names if n in heavy])
    assert counts[0] == counts[1]
    assert counts[0]


@pytest.mark.parametrize("name", ["bone", "mini", "bat-row"])
@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN)])
def test_the_output_of_a_plain_base_is_overwritten_and_no_other(name, shape):
    x, W, bias, (block,) = tensors(name)
    x = torch.randn(shape, dtype=torch.float64)
    for plain in (True, False):
        outputs = []

        def base(base_x, outputs=outputs):
            outputs.append(linear(base_x, W, bias))
            return outputs[0]

        moves = Moves(x)
        variants.get(name).move(moves, x, block, 1.0)
        y = moves.run(base, lambda: (W, bias), plain)
        assert close(y, reference.forward(x, W, bias, [(name, block, 1.0)]))
        assert (y.data_ptr() == outputs[0].data_ptr()) == plain
        assert not y._is_view() or not plain


def test_an_output_that_the_base_keeps_is_left_as_it_was_without_autograds_views():
    with torch.inference_mode():  # where a view does not say that it is one
        x, W = torch.randn(2, 3, IN, dtype=torch.float64), torch.randn(OUT, IN, dtype=torch.float64)
        block, kept = random_block("bone", OUT, IN, 4), linear(x, W)
        before, moves = kept.clone(), Moves(x)
        variants.get("bone").move(moves, x, block, 1.0)
        y = moves.run(lambda _: kept, lambda: (W, None), is_plain_base=False)
        assert same_bits(kept, before, Promise.UNTOUCHED)
        assert close(y, reference.forward(x, W, None, [("bone", block, 1.0)]))


@pytest.mark.parametrize("size", [12, 13])
def test_tiles_in_place_equal_tiles_out_of_place(size):
    y, t = torch.randn(3, size, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for in_place in (False, True):
        leaf = y.clone().requires_grad_()
        out = add_tiles(leaf * 2, t, in_place)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [leaf, t])])
    for got, want in zip(*results, strict=True):
        assert close(got, want)


def test_operators_compute_in_their_own_dtypes_under_autocast():
    x, W, bias = torch.randn(3, IN), torch.randn(OUT, IN), torch.randn(OUT)
    row, col, E = (random_block(name, OUT, IN, 4, dtype=torch.float32) for name in ("bat-row", "bat-col", "orthogonal"))
    calls = [
        lambda: torch.ops.flashbone.shift_input(x, row, None)[0],
        lambda: torch.ops.flashbone.shift_input(x, row, None)[1],
        lambda: torch.ops.flashbone.shift_input_backward(x, x[:, :4], x, row, True, True, True)[0],
        lambda: torch.ops.flashbone.shift_input_backward(x, x[:, :4], x, row, True, True, True)[1],
        lambda: torch.ops.flashbone.rotate_input(x, E, None),
        lambda: torch.ops.flashbone.rotate_input_backward(x, x, E, True, True, True)[0],
        lambda: torch.ops.flashbone.rotate_input_backward(x, x, E, True, True, True)[1],
        lambda: torch.ops.flashbone.bat_col_linear(x, W, bias, [col], True),
        *(
            lambda i=i: torch.ops.flashbone.bat_col_linear_backward(x[:, :OUT], x, W, [col], True, [True] * 4)[i]
            for i in range(4)
        ),
    ]
    for call in calls:
        want = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert same_bits(call(), want, Promise.SAME_PRODUCT)
    with without_autocast("meta"):  # which has none
        assert torch.empty(2, device="meta").device.type == "meta"
