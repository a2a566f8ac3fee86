"""Layers whose rows go through different adapters, against one run for each row."""

import pytest
import torch
from torch import nn

from flashbone import BoneLinear
from flashbone.errors import ConfigError, ShapeError
from flashbone.ops import backend
from flashbone.tuner.layers import kinds
from flashbone.tuner.layers.calls import CURRENT, Gate, one_call
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits

OUT, IN = 11, 14  # no multiples of the block sizes
ORDERS = {
    "side by side": ["0", "0", "1", "2", "2", "2", "3", "4", "__base__"],
    "anyhow": ["3", "__base__", "0", "4", "2", "0", "1", "2", "3"],
    "base first": ["__base__", "__base__", "1", "1", "3"],
    "base alone": ["__base__", "__base__"],
    "one": ["3", "3", "3"],
}


def layer_of(variants=VARIANT_NAMES, dtype=torch.float64, **base) -> BoneLinear:
    """A layer with one filled adapter for each variant, named by its position."""
    torch.manual_seed(0)
    layer = BoneLinear(nn.Linear(IN, OUT, dtype=dtype, **base), "0", 3, False, variant=variants[0], mini_r=2)
    for i, variant in enumerate(variants[1:], 1):
        layer.update_layer(str(i), 3 + i % 2, False, variant=variant, mini_r=2)
    for i, name in enumerate(layer.bone_block):
        layer.bone_block[name].data = torch.randn_like(layer.bone_block[name]).to(dtype) / 3
        layer.set_scale(name, 1 - i / 5)
    return layer.eval()


def row_by_row(layer: BoneLinear, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    """What the layer gives for each row alone, with the row's adapter active."""
    rows = []
    for row, name in zip(x.split(1), names, strict=True):
        if name == "__base__" or name not in layer.bone_block:
            rows.append(layer.base_layer(row))
        else:
            layer.set_adapter([name])
            rows.append(layer(row))
    return torch.cat(rows)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN)])
@pytest.mark.parametrize("names", ORDERS.values(), ids=list(ORDERS))
def test_a_mixed_batch_equals_a_run_for_each_row(names, shape, grad):
    layer = layer_of()
    x = torch.randn(len(names), *shape, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        assert close(layer(x, adapter_names=names), row_by_row(layer, x, names))


def test_gradients_equal_those_of_a_run_for_each_row():
    layer, names = layer_of(), ORDERS["anyhow"]
    x = torch.randn(len(names), 4, IN, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.bone_block.values()]
    factors = torch.randn(len(names), 4, OUT, dtype=torch.float64)
    layer.requires_grad_(True)
    got = torch.autograd.grad((layer(x, adapter_names=names) * factors).sum(), wanted)
    loss = sum((row_by_row(layer, x[i : i + 1], [name]) * factors[i]).sum() for i, name in enumerate(names))
    layer.requires_grad_(True)  # set_adapter freezes the others
    want = torch.autograd.grad(loss, wanted, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert b is not None
        assert b.abs().max() > 1e-3
        assert close(a, b)


@pytest.mark.parametrize("tokens", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("names", ["012012", "010222", "000000012", "01_2", "219_0"], ids=str)
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_in_the_steps_of_a_call_groups_of_any_sizes_get_their_own_adapter(variant, names, dtype, tokens):
    names = ["__base__" if name == "_" else name for name in names]
    layer = layer_of([variant], dtype)
    for name in "12":
        layer.update_layer(name, 2, False, variant=variant, mini_r=2)
    layer.update_layer("0", 2 + len(tokens), False, variant=variant, mini_r=2)  # of the others' size, or of another
    layer.bone_block.to(torch.float32 if dtype == torch.float16 else dtype)
    layer.set_scale("1", 0.5)
    x = torch.randn(len(names), *tokens, IN, dtype=dtype)
    before = x.clone()
    with torch.no_grad():
        want = row_by_row(layer, x, names)
        with one_call(Gate()):
            got = [layer(x, adapter_names=names) for _ in range(3)]  # stacked from the second step on
        alone = layer(x, adapter_names=names)
    assert same_bits(x, before, Promise.UNTOUCHED)
    assert all(y.shape == want.shape and close(y, want) for y in (*got, alone))


@pytest.mark.parametrize("variant", ["bone", "mini"])
def test_the_steps_of_a_call_use_the_backend_that_was_asked_for(variant, monkeypatch):
    plain, seen = backend.BACKENDS["torch"], []

    def counted(x: torch.Tensor, r: int, divisor: int) -> torch.Tensor:
        seen.append(len(x))
        return plain.bounded_sum(x, r, divisor)

    monkeypatch.setitem(backend.BACKENDS, "triton", plain._replace(bounded_sum=counted))
    layer = layer_of([variant, variant])
    layer.update_layer("1", 3, False, variant=variant, mini_r=2)
    layer.bone_block.to(torch.float64)
    layer.backend = "triton"
    x, names = torch.randn(3, IN, dtype=torch.float64), ["0", "1", "0"]
    with torch.no_grad(), one_call(Gate()):
        for _ in range(3):
            y = layer(x, adapter_names=names)
    assert sorted(seen) == [1, 1, 1, 2, 2, 2]  # the rows of each adapter, in each step
    assert close(y, row_by_row(layer, x, names))


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_the_base_runs_once_on_rows_that_need_it(variant):
    layer, seen = layer_of([variant, variant]), []

    def counted(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        seen.append(x.numel() // IN)
        return nn.functional.linear(x, *parameters)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(kinds, "linear", counted)
        layer(torch.randn(6, 2, IN, dtype=torch.float64), adapter_names=["0", "1", "__base__", "0", "1", "0"])
    # A product with bat-col's shifted weight takes the place of the base's.
    assert seen == ([2] if variant == "bat-col" else [12])


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_base_with_hooks_is_called_whole(variant):
    layer, names = layer_of([variant, variant]), ["1", "0", "__base__", "1"]
    layer.base_layer.register_forward_hook(lambda module, args, y: y * 2)
    x = torch.randn(4, 3, IN, dtype=torch.float64)
    with torch.no_grad():
        assert close(layer(x, adapter_names=names), row_by_row(layer, x, names))


@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_that_is_fetched_for_each_reader_is_fetched_again_in_backward(grad, monkeypatch):
    layer, names = layer_of(["bat-col", "bone"]), ["1", "0", "__base__", "0"]
    x = torch.randn(4, 3, IN, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        want = row_by_row(layer, x, names)
        fetched, weight = [], layer.base_kind.weight
        monkeypatch.setattr(layer.base_kind, "is_refetched", lambda module: True)
        monkeypatch.setattr(layer.base_kind, "weight", lambda module: fetched.append(module) or weight(module))
        got = layer(x, adapter_names=names)
    assert close(got, want)
    assert len(fetched) == 1
    if grad:
        block = layer.bone_block["0"]
        assert close(*(torch.autograd.grad(y.square().sum(), block)[0] for y in (got, want)))
        assert len(fetched) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_bases_keep_their_dtype(dtype):
    layer, names = layer_of(dtype=dtype), ORDERS["anyhow"]
    layer.bone_block.float()
    x = torch.randn(len(names), 2, IN, dtype=dtype)
    with torch.no_grad():
        got, want = layer(x, adapter_names=names), row_by_row(layer, x, names)
    assert got.dtype == dtype
    assert close(got, want)


def test_autocast_gives_what_it_gives_row_by_row():
    layer, names = layer_of(dtype=torch.float32), ORDERS["anyhow"]
    x = torch.randn(len(names), 2, IN)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = layer(x, adapter_names=names), row_by_row(layer, x, names)
    assert got.dtype == torch.bfloat16
    assert close(got, want)


def test_inference_solves_each_rotation_once_and_keeps_no_weights():
    layer, names = layer_of(["orthogonal", "orthogonal", "bat-col"]), ["0", "1", "2", "1"]
    x = torch.randn(4, IN, dtype=torch.float64)
    with torch.no_grad(), one_call(Gate()):
        got = layer(x, adapter_names=names)
        kept = {part: list(kept.values) for (_, part), kept in CURRENT.kept.items() if part}
        assert {part: len(keys) for part, keys in kept.items()} == {"0": 1, "1": 1, "2": 0}
        layer(x, adapter_names=names)
        assert {part: list(kept.values) for (_, part), kept in CURRENT.kept.items() if part} == kept
    with torch.no_grad():
        assert close(got, row_by_row(layer, x, names))


def test_a_layer_without_some_adapter_is_the_base_on_its_rows():
    layer = layer_of(["bone", "mini"])
    x = torch.randn(3, IN, dtype=torch.float64)
    got = layer(x, adapter_names=["elsewhere", "1", "0"])
    assert close(got[:1], layer.base_layer(x[:1]))
    assert close(got, row_by_row(layer, x, ["elsewhere", "1", "0"]))


def test_rows_are_counted_merges_and_training_are_refused():
    layer = layer_of(["bone", "mini"])
    x = torch.randn(3, IN, dtype=torch.float64)
    with pytest.raises(ShapeError, match="2 names, but a layer gets an input with 3 rows"):
        layer(x, adapter_names=["0", "1"])
    layer.merge(adapter_names=["0"])
    with pytest.raises(ConfigError, match=r"cannot be used while adapters are merged.*unmerge_adapter"):
        layer(x, adapter_names=["0", "1", "0"])
    layer.enable_adapters(False)
    assert same_bits(layer(x, adapter_names=["0", "1", "0"]), layer.base_layer(x), Promise.SAME_PRODUCT)
    assert not layer.merged


def test_a_layer_in_training_mode_takes_no_names():
    layer = layer_of(["bone"]).train()
    with pytest.raises(ConfigError, match=r"training mode; call eval\(\) first"):
        layer(torch.randn(2, IN, dtype=torch.float64), adapter_names=["0", "0"])
