"""Switches of a whole model: who computes the moves, and what inference keeps."""

from importlib.util import find_spec

import pytest
import torch
from peft import BoneConfig, get_peft_model

from flashbone import BoneLinear
from flashbone.errors import BackendError, ConfigError
from flashbone.ops import backend
from flashbone.tuner.layers.calls import CURRENT
from helpers.mlp import MLP


def test_backends_are_asked_for_by_name_and_fail_without_a_trace():
    model = get_peft_model(MLP((12, 16, 8)), BoneConfig(r=4, target_modules=["lin0", "lin1"], init_weights=False))
    with pytest.raises(ConfigError, match="backend: got 'cuda', wanted one of 'torch', 'triton'"):
        model.base_model.set_backend("cuda")
    if find_spec("triton") is None:
        with pytest.raises(BackendError, match="the package triton cannot be imported"):
            model.base_model.set_backend("triton")
    assert model(torch.ones(1, 12, dtype=torch.float64)).shape == (1, 8)


def test_what_inference_keeps_can_be_switched_off_also_for_layers_that_come_later():
    model = get_peft_model(MLP((12, 16, 8)), BoneConfig(r=4, variant="bat-col", target_modules=["lin0"]))
    model.base_model.cache_in_inference(False)
    model.add_adapter("second", BoneConfig(r=4, variant="bat-col", target_modules=["lin1"]))
    model.eval().base_model.set_adapter(["default", "second"])
    layers = [m for m in model.modules() if isinstance(m, BoneLinear)]
    assert len(layers) == 2
    for keep in (False, True, False):
        model.base_model.cache_in_inference(keep)
        with torch.no_grad(), model.base_model.unchanged():
            for _ in range(2):
                model.base_model.model(torch.ones(1, 12, dtype=torch.float64))
            assert sum(len(kept.values) for kept in CURRENT.kept.values()) == (2 if keep else 0)


@pytest.mark.parametrize("variant", ["bone", "mini", "bat-row"])
def test_a_backend_reaches_every_layer_also_those_that_come_later(variant, monkeypatch):
    calls = []
    torch_backend = backend.get("torch")

    def counted(function):
        return lambda *args: calls.append(function) or function(*args)

    monkeypatch.setitem(backend.BACKENDS, "triton", backend.Backend(*map(counted, torch_backend)))
    model = get_peft_model(MLP((12, 16, 8)), BoneConfig(r=4, variant=variant, target_modules=["lin0"]))
    model.base_model.set_backend("triton")
    model.add_adapter("second", BoneConfig(r=4, variant=variant, target_modules=["lin1"]))
    model.base_model.set_adapter(["default", "second"])
    model(torch.ones(1, 12, dtype=torch.float64))
    assert len(calls) == 2
    model.base_model.set_backend("torch")
    model(torch.ones(1, 12, dtype=torch.float64))
    assert len(calls) == 2
