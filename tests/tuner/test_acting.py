"""The net: adapters that do nothing are named in the first steps; what merely had nothing to do is not an error."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import BoneConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from flashbone.errors import ConfigError
from flashbone.train.inert import StopIfInert
from flashbone.tuner.model.acting import ZERO_PASSES, InertAdapterWarning, nets
from helpers.comparison import close

X = torch.linspace(-1, 1, 24).view(4, 6)


class CutOff(nn.Linear):
    """Its output has a gradient, and what it does to its weight has none."""

    def forward(self, x):
        return F.linear(x, self.weight.detach(), self.bias)


class Host(nn.Module):
    """`way` decides what becomes of the layer b."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(6, 6), nn.Linear(6, 6), way
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        if way == "cuts_off":
            self.b = CutOff(6, 6)

    def forward(self, x):
        return getattr(self, f"_{self.way}")(self.a(x))

    def _calls(self, x):
        return self.b(x)

    def _bypasses(self, x):  # in a way that no reading of the source sees
        return F.linear(x, self.b.get_parameter("base_layer.weight" if hasattr(self.b, "bone_block") else "weight"))

    def _bypasses_in_eval(self, x):
        return self._calls(x) if self.training else self._bypasses(x)

    def _detaches(self, x):
        return x + self.b(x).detach()

    _cuts_off = _calls

    def _computes_for_nobody(self, x):  # as a pooler that no head reads
        self.pooled = self.b(x)
        return x

    def _multiplies_by_zero(self, x):
        return x + self.b(x) * 0

    def _leaves_out(self, x):
        return x

    def _takes_no_token(self, x):
        return x + self.b(x[:0]).sum()

    def _asks(self, x):
        return self.b(x.to(self.b.base_layer.weight)) + torch.zeros_like(self.b.base_layer.weight)[0]


def model_of(way: str, **fields):
    return get_peft_model(Host(way), BoneConfig(r=2, target_modules=["a", "b"], **fields))


def steps(model, count: int, **kwargs) -> None:
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(count):
        model.train()(X).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    with torch.no_grad():
        model(X)


BYPASSED = "the model computes with the weights of these layers"
UNHEARD = "these layers ran, and no gradient came back to what they returned"


@pytest.mark.parametrize(
    ("way", "message", "stops"),
    [
        ("bypasses", BYPASSED, True),
        ("bypasses_in_eval", BYPASSED, True),
        ("cuts_off", "a gradient came back to these layers, and none reached their adapters", True),
        ("detaches", UNHEARD, False),
        ("computes_for_nobody", UNHEARD, False),
        (
            "multiplies_by_zero",
            f"the gradient of their adapters was exactly zero in {ZERO_PASSES} backward pass",
            False,
        ),
    ],
)
def test_an_adapter_that_does_nothing_is_named_once_and_stops_a_run_where_its_output_is_used(way, message, stops):
    model = model_of(way)
    with pytest.warns(InertAdapterWarning, match=f"^b: {message}") as caught:
        steps(model, ZERO_PASSES + 2)
    assert len(caught) == 1
    steps(model, 2)
    for net in nets(fresh := model_of(way)):
        net.raises = True
    outcome = pytest.raises(ConfigError, match=message) if stops else pytest.warns(InertAdapterWarning, match=message)
    with outcome:
        steps(fresh, ZERO_PASSES + 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_pooler_that_nobody_reads_is_named_inside_a_checkpoint_too(reentrant):
    model = model_of("computes_for_nobody").train()
    x = X.clone().requires_grad_(True)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    with pytest.warns(InertAdapterWarning, match=UNHEARD):
        steps(model, 2)


@pytest.mark.parametrize("way", ["calls", "leaves_out", "takes_no_token", "asks"])
@pytest.mark.parametrize("variant", ["bone", "bat-col", "orthogonal"])
def test_what_had_nothing_to_do_stops_nothing(way, variant, caplog):
    model = model_of(way, variant=variant)
    steps(model, 2 * ZERO_PASSES + 2)
    idle = [record.getMessage() for record in caplog.records]
    expected = ["training", "evaluation"] if way in ("leaves_out", "takes_no_token") else []
    assert idle == [f"the first {phase} did not call the adapted layers b" for phase in expected]


def test_after_the_first_steps_nothing_of_the_net_is_left():
    model = model_of("calls")
    steps(model, 2)
    assert not model.base_model._forward_pre_hooks
    assert not model.base_model._forward_hooks
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in (model.base_model.model.a, model.base_model.model.b)
    )
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_frozen_accumulated_disabled_and_checkpointed_adapters_raise_no_alarm():
    model = model_of("calls")
    for _ in range(3):  # forwards before a backward, as contrastive losses do
        model.train()(X)
    (model(X).sum() + model(X).square().sum()).backward()
    with model.disable_adapter():
        model(X)
    model.requires_grad_(False)
    model.add_adapter("second", BoneConfig(r=2, target_modules=["a"]))
    model.set_adapter("second")
    for reentrant in (True, False):
        x = X.clone().requires_grad_(True)
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    steps(model, 2)
    assert model.base_model.model.a.bone_block["second"].grad is None  # the optimiser cleared it


def test_a_failed_forward_leaves_no_hooks_and_copies_are_watched_anew():
    model = model_of("calls")
    with pytest.raises(RuntimeError):
        model.train()(X[:, :4])
    assert not model.base_model.model.a._forward_pre_hooks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(nets(copied)) == 1
            assert nets(copied).keys().isdisjoint(nets(model))
            steps(copied, 2)
    assert close(model.eval()(X), model.base_model.model(X))


def test_a_training_run_stops_after_the_first_backward():
    model, callbacks = model_of("cuts_off"), []
    StopIfInert.attach(SimpleNamespace(model=model, add_callback=callbacks.append))
    model.train()(X).square().sum().backward()
    with pytest.raises(ConfigError, match="b: a gradient came back to these layers, and none reached"):
        callbacks[0].on_pre_optimizer_step(None, None, None, model=model)
    callbacks[0].on_pre_optimizer_step(None, None, None, model=model)  # once
