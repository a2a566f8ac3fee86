"""Reads of a weight that the scan of sources does not see: the first forward shifts the weight, or names the layer."""

import copy
import functools
import threading
from collections.abc import Callable

import pytest
import torch
from peft import BoneConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flashbone.errors import ConfigError
from flashbone.tuner.layers.layer import bone_layers
from flashbone.tuner.model.acting import InertAdapterWarning, nets
from flashbone.tuner.model.watching import READER
from helpers.comparison import close
from helpers.layers import adapted, gradients

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
SPACE = {"F": F}
exec("def without_source(host, x):\n    return F.linear(x, host.b.weight)", SPACE)
CALLED = "called"


class Host(nn.Module):
    def __init__(self, read: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Linear(6, 6), nn.Linear(6, 6), read
        self.name = "b"

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, self.a(x))


def passed(x: Tensor, layer: nn.Module) -> Tensor:
    return F.linear(x, layer.weight)


READS = {
    "without source": SPACE["without_source"],
    "partial": functools.partial(lambda factor, host, x: F.linear(x, host.b.weight * factor), 2),
    "passed": lambda host, x: passed(x, host.b),
    "by name": lambda host, x: F.linear(x, getattr(host, host.name).weight),
    "submodule": lambda host, x: F.linear(x, host.get_submodule("b").weight),
    "method": lambda host, x: x @ host.b.weight.t(),
    "copied": lambda host, x: F.linear(x, host.b.weight.to(torch.float32).to(x.dtype)),
    "stacked": lambda host, x: F.linear(x, torch.cat([host.b.weight, host.b.weight])[:6]),
    "keyword": lambda host, x: F.linear(input=x, weight=host.b.weight),
    "checkpointed": lambda host, x: checkpoint(lambda y: F.linear(y, host.b.weight), x, use_reentrant=False),
    "both": lambda host, x: F.linear(host.b(x), host.b.weight),
    CALLED: lambda host, x: host.b.forward(x),
}


def model_of(read: Callable[[nn.Module, Tensor], Tensor], **fields) -> nn.Module:
    torch.manual_seed(0)
    return adapted(Host(read).double(), "bone", target_modules=["a", "b"], **fields)


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize("training", [True, False])
def test_the_first_forward_already_has_the_shifted_weight(way, training):
    model = model_of(READS[way]).train(training)
    want = copy.deepcopy(model).merge_and_unload()(X)
    tolerance = torch.float32 if way == "copied" else torch.float64
    blocks = [p for p in model.parameters() if p.requires_grad]
    first = model(X)
    of_first = gradients(first, blocks)
    assert close(first, want, tolerance)
    for mode in (training, not training):
        for _ in range(2):
            got = model.train(mode)(X)
            assert close(got, want, tolerance)
            for g, w in zip(gradients(got, blocks), of_first, strict=True):
                assert w.any()
                assert close(g, w, tolerance)
    layer = model.base_model.model.b
    assert (layer.weight_reader, layer.is_only_read) == ((None, False) if way == CALLED else (READER, way != "both"))
    with model.disable_adapter():
        assert not close(model(X), want, tolerance)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_a_host_may_read_a_weight(kind):
    host = Host(lambda host, x: x).double()
    if kind == "register_forward_hook":
        host.register_forward_hook(lambda module, args, output: F.linear(output, module.b.weight))
    else:
        host.register_forward_pre_hook(lambda module, args: F.linear(args[0], module.b.weight))
    model = adapted(host, "bone", target_modules=["a", "b"])
    want = copy.deepcopy(model).merge_and_unload()(X)
    assert close(model.train()(X), want)
    assert close(model.eval()(X), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_read_inside_a_checkpoint_has_the_same_gradient_in_every_step(reentrant):
    model, steps = model_of(READS["passed"]).train(), []
    blocks = [p for p in model.parameters() if p.requires_grad]
    want = copy.deepcopy(model)
    for _ in range(3):
        checkpoint(model, X.clone().requires_grad_(True), use_reentrant=reentrant).square().sum().backward()
        steps.append([block.grad.clone() for block in blocks])
        model.zero_grad()
    want(X).square().sum().backward()
    grads = [p.grad for p in want.parameters() if p.requires_grad]
    for got in steps:
        assert all(close(g, w) for g, w in zip(got, grads, strict=True))


PAST = {
    "parameters": lambda host, x: F.linear(x, next(p for n, p in host.b.named_parameters() if n.endswith("weight"))),
    "state_dict": lambda host, x: F.linear(x, next(v for n, v in host.b.state_dict().items() if n.endswith("weight"))),
    "data": lambda host, x: F.linear(x, next(p for n, p in host.b.named_parameters() if n.endswith("weight")).data),
}


@pytest.mark.parametrize("way", PAST)
def test_a_weight_that_is_not_read_off_its_layer_is_named(way):
    with pytest.warns(InertAdapterWarning, match="b: the model computes with the weights of these layers"):
        model_of(PAST[way]).train()(X)


def test_a_read_that_has_no_gradient_is_named():
    model = model_of(lambda host, x: x + F.linear(x, host.b.weight.data))
    for _ in range(2):
        model.train()(X).sum().backward()
    with pytest.warns(InertAdapterWarning, match="b: these layers ran, and no gradient came back"):
        model(X)


def test_a_dropout_that_an_unforeseen_read_cannot_apply_is_refused():
    model = get_peft_model(
        Host(READS["passed"]).double(), BoneConfig(r=2, dropout=0.1, target_modules=["b"]), autocast_adapter_dtype=False
    )
    with pytest.raises(ConfigError, match=r"^b: a module of the model reads the weight of this layer, so dropout=0.1"):
        model.train()(X)
    assert model.base_model.model.b.on_read is None


def test_what_only_describes_fills_or_compares_is_no_read():
    def read(host, x):
        like = passed(x, nn.Linear(6, 6).to(host.b.weight))
        host.b.weight.data_ptr(), host.b.weight.shape, host.b.weight.dtype
        return host.b(x.to(host.b.weight).type_as(host.b.weight)) + torch.zeros_like(host.b.weight)[0] + like * 0

    model = model_of(read)
    model.train()(X)
    assert all(layer.weight_reader is None for _, layer in bone_layers(model))


def test_threads_beside_a_watched_call_are_right_and_raise_no_alarm():
    model = model_of(READS["both"]).eval()
    want = copy.deepcopy(model).merge_and_unload()(X)
    barrier, got = threading.Barrier(4), []

    def call() -> None:
        barrier.wait()
        got.extend(model(X) for _ in range(20))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 80
    assert not nets(model) or all(close(model(X), want) for _ in range(2))
    assert "forward" not in vars(model.base_model.model.b)


class Listed(nn.Module):
    """Calls its children out of a list of its own, as MaskFormer's convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)]
        for number, layer in enumerate(self.layers):
            self.add_module(str(number), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_host_that_lists_its_children_calls_the_adapters_and_gets_its_layers_back():
    base = Listed().double()
    plain, originals = base(X), list(base.layers)
    model = adapted(base, "bone", target_modules=["0", "2"])
    got = model(X)
    assert not close(got, plain)
    blocks = [p for p in model.parameters() if p.requires_grad]
    assert len(blocks) == 2
    assert all(gradient.any() for gradient in gradients(got, blocks))
    assert close(copy.deepcopy(model).merge_and_unload()(X), got)
    bare = model.unload()
    assert [a is b for a, b in zip(bare.layers, originals, strict=True)] == [True] * 3
    assert close(bare(X), plain)
