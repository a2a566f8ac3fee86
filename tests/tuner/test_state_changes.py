"""A layer decides at each call what it does: whatever of its state changes, by whatever way, the next call follows."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from flashbone import BoneLinear
from flashbone.tuner.layers import layer as layers
from flashbone.tuner.layers.calls import Gate, one_call
from helpers import reference
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import close

OUT, IN = 12, 16


def make(variant: str) -> Any:
    """A layer with the adapters "a", which is active, and "b"."""
    layer: Any = BoneLinear(nn.Linear(IN, OUT).double().requires_grad_(False), "a", 4, False, variant=variant, mini_r=3)
    layer.update_layer("b", 4, False, variant=variant, mini_r=3)
    for name in "ab":
        layer.bone_block[name].data = random_block(variant, OUT, IN, 4)
    layer.set_adapter(["a"])
    return layer.eval()


def wanted(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What the formula gives for the state that the layer's fields hold now."""
    active = [] if layer.disable_adapters or layer.merged else layer.active_here()
    adapters = [(layer.bone_variant[n].name, layer.bone_block[n].detach(), layer.bone_scale[n]) for n in active]
    base = layer.get_base_layer()
    return reference.forward(x, base.weight.detach(), base.bias.detach(), adapters)


class Halved(nn.Module):
    def forward(self, W):
        return W / 2


def step(layer, fused):
    p = layer.bone_block["a"].requires_grad_()
    p.grad = torch.randn_like(p)
    torch.optim.AdamW([p], lr=0.3, fused=fused).step()
    p.grad = None


def replace(layer, name, block):
    layer.bone_block[name] = nn.Parameter(block)


def hot(layer):
    with torch.no_grad():
        layer.bone_block["a"].copy_(torch.randn_like(layer.bone_block["a"]))


def loaded(layer):
    layer.load_state_dict({k: v + 0.5 for k, v in layer.state_dict().items()})


CHANGES = {
    "set_adapter": lambda m: m.set_adapter(["b"]),
    "both": lambda m: m.set_adapter(["a", "b"]),
    "assigned active adapter": lambda m: setattr(m, "_active_adapter", "b"),
    "list of active adapters in place": lambda m: m.active_adapters.append("b"),
    "deleted": lambda m: (m.set_adapter(["b"]), m.delete_adapter("a")),
    "added and used": lambda m: (m.update_layer("c", 2, False, variant="bone"), m.set_adapter(["c", "a"])),
    "block of another size": lambda m: m.update_layer("a", 2, False, variant="bone"),
    "disabled": lambda m: m.enable_adapters(False),
    "disabled and enabled": lambda m: (m.enable_adapters(False), m.enable_adapters(True)),
    "scale": lambda m: m.set_scale("a", -2.0),
    "scale in its dictionary": lambda m: m.bone_scale.update(a=3.0),
    "scaled layer": lambda m: m.scale_layer(0.5),
    "unmerged": lambda m: (m.merge(), m.unmerge()),
    "train": lambda m: m.train(),
    "frozen": lambda m: m.requires_grad_(False),
    "dropout that is off": lambda m: m.bone_dropout.update({"a": nn.Dropout(0.5)}),
    "load_state_dict": loaded,
    "block replaced": lambda m: replace(m, "a", torch.randn_like(m.bone_block["a"])),
    "block's data replaced": lambda m: setattr(m.bone_block["a"], "data", torch.randn_like(m.bone_block["a"])),
    "block's data in place": lambda m: m.bone_block["a"].data.mul_(-2),
    "optimiser": lambda m: step(m, False),
    "fused optimiser": lambda m: step(m, True),
    "hot swap": hot,
    "base replaced": lambda m: setattr(m, "base_layer", nn.Linear(IN, OUT).double()),
    "base's weight in place": lambda m: m.base_layer.weight.data.add_(1),
    "base's weight replaced": lambda m: setattr(m.base_layer, "weight", nn.Parameter(torch.ones(OUT, IN).double())),
    "base parametrised": lambda m: parametrize.register_parametrization(m.base_layer, "weight", Halved()),
    "to and back": lambda m: m.float().double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_the_next_call_follows_every_change_of_state(variant, change):
    layer, x = make(variant), torch.randn(2, IN, dtype=torch.float64)
    for make_change in (CHANGES[change], lambda layer: None):
        with torch.no_grad(), one_call(Gate()):
            assert all(close(layer(x), wanted(layer, x)) for _ in range(2))
        assert close(layer(x), wanted(layer, x))
        make_change(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)) if "parametrised" not in change else layer):
        with torch.inference_mode():
            assert close(other(x), wanted(layer, x))
            assert close(other(x[:1]), wanted(layer, x[:1]))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("variant", ["bone", "mini", "bat-row"])  # the others keep what they build of numbers
def test_a_plan_ends_with_the_state_that_it_was_made_in(variant, change):
    layer, x = make(variant), torch.randn(2, IN, dtype=torch.float64)
    with torch.no_grad(), one_call(Gate()):
        for make_change in (lambda layer: None, CHANGES[change], lambda layer: None):
            make_change(layer)
            assert all(close(layer(x), wanted(layer, x)) for _ in range(4))


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (1, 1, IN), (5, IN), (2, 3, IN), (0, IN)])
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_later_calls_of_one_adapter_run_its_plan(variant, shape, monkeypatch):
    layer, x = make(variant), torch.randn(shape, dtype=torch.float64)
    layer.set_scale("a", -0.5)
    want = wanted(layer, x)
    with torch.no_grad(), one_call(Gate()):
        assert all(close(layer(x), want) for _ in range(2))
        monkeypatch.setattr(layers, "Moves", None)
        y = layer(x)
        assert y.shape == want.shape
        assert close(y, want)
        assert close(layer(x.mT.contiguous().mT) if x.ndim > 1 else layer(x), want)
        for other in (x.float(), x.requires_grad_(), layer.train()):
            with pytest.raises(TypeError), torch.set_grad_enabled(other is x):
                layer(x if other is layer else other)
            x.requires_grad_(False)


@pytest.mark.parametrize(("variant", "r"), [("bone", 5), ("mini", 5), ("bat-row", 5), ("orthogonal", 5)])
def test_a_ragged_shard_is_decided_at_each_call(variant, r):
    layer: Any = BoneLinear(nn.Linear(IN, OUT).double(), "a", r, False, variant=variant, mini_r=5).eval()
    layer.bone_block["a"].data = random_block(variant, OUT, IN, r)
    x = torch.randn(2, IN, dtype=torch.float64)
    with torch.no_grad(), one_call(Gate()):
        assert all(close(layer(x), wanted(layer, x)) for _ in range(4))


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_hooks_and_modes_that_come_between_two_calls_take_part(variant):
    layer, x = make(variant), torch.randn(3, IN, dtype=torch.float64)
    with torch.no_grad(), one_call(Gate()):
        want = wanted(layer, x)
        base = layer.base_layer
        bare = torch.nn.functional.linear(x, base.weight, base.bias)
        assert close(layer(x), want)
        if variant in ("bone", "mini"):
            handle = base.register_forward_hook(lambda module, args, y: 3 * y)
            assert close(layer(x), want + 2 * bare)
            handle.remove()
        assert close(torch.func.vmap(layer)(x), want)
        parameters = {"bone_block.a": 2 * layer.bone_block["a"]}
        doubled = torch.func.functional_call(layer, parameters, (x,))
        assert not close(doubled, want)
        assert close(layer(x), want)
        layer.float()
        for enabled in (False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = layer(x.float())
            assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
            assert close(y, want)
