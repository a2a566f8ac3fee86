"""Who runs the time mixing: torch, or kernels of flash-linear-attention, which first have to agree with it.

Here our own loop stands in for the kernels, under their signatures; tests/hosts/test_fla.py runs the real ones.
"""

import copy
import importlib.util
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from flashbone.errors import BackendError
from flashbone.rwkv import Rwkv6Config, Rwkv7Config, kernels, wkv6, wkv7
from helpers.comparison import close, relative_error

CONFIGS = {7: Rwkv7Config, 6: Rwkv6Config}
WKV = {7: wkv7, 6: wkv6}
CPU = torch.device("cpu")
TOKENS = torch.randint(0, 30, (2, 50), generator=torch.Generator().manual_seed(3))


def raises(*_):
    raise RuntimeError("out of\nresource")


# What a kernel may get wrong: from its r, outputs and last state (key by value features) to what it returns instead.
FAULTS = {
    "output": (lambda r, y, last: (1.1 * y, last), "differ from ours by 0.1 "),
    "state": (lambda r, y, last: (y, last.mT), "differ from ours by 1"),
    "gradient": (lambda r, y, last: (y + 0.3 * (r - r.detach()), last), "differ from ours by 0."),
    "no gradient": (
        lambda r, y, last: (y.detach(), last),
        "kernel fails on cpu .RuntimeError: ",
    ),
    "NaN output": (lambda r, y, last: (y / 0, last), "differ from ours by nan"),
    "NaN in the state": (lambda r, y, last: (y, last * float("nan")), "differ from ours by nan"),
    "NaN gradient": (lambda r, y, last: (y + (r - r.detach()).square().sqrt(), last), "differ from ours by nan"),
    "an exception": (raises, "kernel fails on cpu .RuntimeError: out of resource.;"),
}


class StandIn:
    """In the places of fla.ops.rwkv7 and fla.ops.rwkv6 with the signatures and the demands of version 0.6."""

    def __init__(self, patch, fault=lambda r, y, last: (y, last)):
        self.fault, self.calls = fault, []
        for version, kernel in ((7, self.chunk_rwkv7), (6, self.chunk_rwkv6)):
            module = ModuleType(f"fla.ops.rwkv{version}")
            setattr(module, f"chunk_rwkv{version}", kernel)
            patch.setitem(sys.modules, module.__name__, module)

    def chunk_rwkv7(self, r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None):
        assert {x.dtype for x in (k, v, a, b)} == {r.dtype}
        return self._results(wkv7, (r, w, k, v, a, b), scale, initial_state, output_final_state)

    def chunk_rwkv6(self, r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
        assert {x.dtype for x in (k, v, u)} == {r.dtype}
        return self._results(wkv6, (r, w, k, v, u), scale or r.shape[-1] ** -0.5, initial_state, output_final_state)

    def _results(self, op, given, scale, initial_state, output_final_state):
        self.calls.append(tuple(given[0].shape))
        assert initial_state.dtype == torch.float32
        y, last = op.loop(*given, initial_state.mT)
        y, last = self.fault(given[0], y * scale, last.mT)
        return y.to(given[0].dtype), last if output_final_state else None


@pytest.fixture(autouse=True)
def _nothing_known():
    kernels.why_not.cache_clear()
    yield
    kernels.why_not.cache_clear()


@pytest.fixture
def without_fla():
    if importlib.util.find_spec("fla"):
        pytest.skip("flash-linear-attention is installed here")


@pytest.fixture
def stand_in(monkeypatch):
    return StandIn(monkeypatch)


def model(version, backend, **fields):
    torch.manual_seed(1)
    sizes = {"vocab_size": 30, "hidden_size": 32, "head_size": 16, "num_hidden_layers": 2}
    made = AutoModelForCausalLM.from_config(CONFIGS[version](wkv_backend=backend, **sizes, **fields))
    for parameter in made.parameters():  # a random start has zeros, which would hide what is not passed on
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def like(device="cpu", dtype=torch.float32, head_size=16):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 2, 1, head_size))


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_torch_and_on_a_cpu_auto_never_call_fla(version, backend, stand_in):
    model(version, backend)(TOKENS)
    assert not stand_in.calls
    assert not kernels.chooses_fla(WKV[version], backend, like())


@pytest.mark.parametrize("version", CONFIGS)
def test_fla_by_name_without_the_package_is_refused_in_one_line(version, without_fla):
    with pytest.raises(BackendError) as refusal:
        model(version, "fla")(TOKENS)
    assert str(refusal.value) == ("wkv_backend 'fla': flash-linear-attention is not installed; use 'auto' or 'torch'")


def test_what_fla_itself_lacks_is_named(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv7", ModuleType("fla.ops.rwkv7"))  # an older one, say
    assert "AttributeError: module 'fla.ops.rwkv7' has no attribute 'chunk_rwkv7'" in kernels.why_not(
        wkv7, CPU, torch.float32, 16
    )
    assert len(caplog.records) == 1


@pytest.mark.parametrize("version", CONFIGS)
def test_fla_by_name_gives_our_logits_states_and_gradients(version, stand_in):
    found = []
    for backend in ("torch", "fla"):
        made = model(version, backend)
        out = made(TOKENS, labels=TOKENS, use_cache=True)
        out.loss.backward()
        grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
        found.append([out.logits, *(layer.wkv for layer in out.past_key_values.layers), *grads.values()])
    assert stand_in.calls.count((2, 50, 2, 16)) == 2  # blocks
    assert all(relative_error(got, want) < 2e-5 for want, got in zip(*found, strict=True))  # two blocks' rounding


@torch.no_grad()
@pytest.mark.parametrize("version", CONFIGS)
def test_padding_and_a_state_passed_on_go_through_fla(version, stand_in):
    mask = torch.ones_like(TOKENS)
    mask[0, :7] = mask[1, 40:] = 0
    ours, theirs = model(version, "torch"), model(version, "fla")
    want = ours(TOKENS, attention_mask=mask).logits
    first = theirs(TOKENS[:, :20], attention_mask=mask[:, :20], use_cache=True)
    second = theirs(TOKENS[:, 20:], attention_mask=mask, past_key_values=first.past_key_values)
    got = torch.cat([first.logits, second.logits], 1)
    assert close(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_first_call_may_be_one_without_gradients(version, mode, stand_in):
    with mode():
        got = model(version, "fla")(TOKENS).logits
        assert close(got, model(version, "torch")(TOKENS).logits)
    assert kernels.why_not(WKV[version], CPU, torch.float32, 16) is None


@torch.no_grad()
@pytest.mark.parametrize("version", CONFIGS)
def test_under_autocast_fla_gets_one_dtype(version, stand_in):
    """Of RWKV-7, k, v, a and b are made with parameters in fp32, r by a linear layer alone."""
    want = model(version, "torch")(TOKENS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(version, "fla")(TOKENS).logits.float()
    assert stand_in.calls
    assert float((got - want).norm() / want.norm()) < 0.1


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_wrong_anywhere_is_refused_with_the_reason(version, fault, monkeypatch):
    wrong, message = FAULTS[fault]
    StandIn(monkeypatch, wrong)
    with pytest.raises(BackendError, match=f"^wkv_backend 'fla': its .*{message}") as refusal:
        model(version, "fla")(TOKENS)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith("; use 'auto' or 'torch'")


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("dtype", kernels.TOLERANCES)
def test_the_comparison_lets_a_right_kernel_pass_in_every_dtype(version, dtype, stand_in):
    assert kernels.why_not(WKV[version], CPU, dtype, 16) is None


def test_fp64_is_not_fla_s(stand_in):
    assert kernels.why_not(wkv7, CPU, torch.float64, 16) == "it computes no float64"
    with pytest.raises(BackendError, match="wkv_backend 'fla': it computes no float64; use"):
        copy.deepcopy(model(7, "fla")).double()(TOKENS)
    assert not stand_in.calls


@pytest.mark.parametrize("version", CONFIGS)
def test_each_device_dtype_and_head_size_is_compared_once(version, stand_in):
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            for head_size in (8, 16):
                assert kernels.chooses_fla(WKV[version], "fla", like(dtype=dtype, head_size=head_size))
    assert len(stand_in.calls) == 4


@pytest.fixture
def gpu(monkeypatch):
    """A tensor as on a GPU; what the comparison would put there stays on the CPU."""
    sample = kernels._sample
    monkeypatch.setattr(kernels, "_sample", lambda wkv, device, *rest: sample(wkv, CPU, *rest))
    return like("cuda")


@pytest.mark.parametrize("version", CONFIGS)
def test_on_a_gpu_auto_takes_a_kernel_that_agrees(version, stand_in, gpu, caplog):
    assert kernels.chooses_fla(WKV[version], "auto", gpu)
    assert not caplog.records


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("fault", FAULTS)
def test_on_a_gpu_auto_falls_back_to_torch_with_one_warning(version, fault, monkeypatch, gpu, caplog):
    StandIn(monkeypatch, FAULTS[fault][0])
    assert not any(kernels.chooses_fla(WKV[version], "auto", gpu) for _ in range(3))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"flash-linear-attention's kernel of RWKV-{version} is not used: its ")


def test_on_a_gpu_without_the_package_auto_takes_torch_and_says_nothing(without_fla, gpu, caplog):
    assert not kernels.chooses_fla(wkv7, "auto", gpu)
    assert not caplog.records
