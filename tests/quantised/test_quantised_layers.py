"""Adapters on quantised layers: outputs, gradients, what is read and what is kept."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import BoneConfig, get_peft_model

from flashbone.errors import ConfigError
from flashbone.tuner.layers.calls import CURRENT, Gate, one_call
from helpers import reference
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, relative_error, same_bits
from helpers.quantised import BACKENDS, adapted, dequantised, quantised_linear

pytestmark = pytest.mark.beside

OUT, IN, R = 96, 64, 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [*[(name,) for name in VARIANT_NAMES], VARIANT_NAMES], ids=str)
def test_output_and_gradients_are_those_of_the_dequantised_layer(backend, names):
    made = quantised_linear(backend)
    layer = adapted(made, R, *names)
    x = torch.randn(2, 5, IN, requires_grad=True)
    W, bias = layer.base_kind.weight(made.layer), made.layer.bias.float()
    blocks = [layer.bone_block[name] for name in names]
    got = layer(x)
    want = reference.forward(x, W, bias, [(n, b, 1.0) for n, b in zip(names, blocks, strict=True)])
    weights = torch.randn(got.shape)
    grads = [torch.autograd.grad((y * weights).sum(), [x, *blocks]) for y in (got, want)]
    tolerance = 2e-2 if made.rounds_input else 3e-6
    assert relative_error(got, want) <= tolerance
    for g, w in zip(*grads, strict=True):
        assert relative_error(g, w) <= tolerance
    if not made.rounds_input:
        assert close(W, dequantised(made.layer))


# Where the input is rounded, the gradient of the input goes through the dequantised weight, with any adapter or none.
@pytest.mark.parametrize("backend", [name for name in BACKENDS if "activations" not in name])
@pytest.mark.parametrize("name", [name for name in VARIANT_NAMES if name != "bat-col"])
def test_all_variants_but_bat_col_train_without_dequantising_the_weight(backend, name, monkeypatch):
    made = quantised_linear(backend)
    layer = adapted(made, R, name)
    monkeypatch.setattr(type(layer.base_kind.backend), "get_base_weight", refuse)
    x = torch.randn(2, IN, requires_grad=True)
    layer(x).sum().backward()
    assert layer.bone_block[name].grad.abs().max() > 0
    layer.eval()
    with torch.no_grad():
        assert layer(x).isfinite().all()
    with pytest.raises(AssertionError, match="was dequantised"):
        layer.get_delta_weight(name)


def refuse(*_):
    raise AssertionError("the weight was dequantised")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bat_col_dequantises_in_forward_and_in_backward_and_keeps_nothing_between(backend, monkeypatch):
    made = quantised_linear(backend)
    layer, reads = adapted(made, R, "bat-col", "bat-row", "bone"), []
    read = type(layer.base_kind.backend).get_base_weight
    monkeypatch.setattr(type(layer.base_kind.backend), "get_base_weight", lambda *a: reads.append(1) or read(*a))
    x = torch.randn(2, IN, requires_grad=True)
    y, kept = run_and_kept(layer, x)
    own = run_and_kept(made.layer, x)[1]  # torchao keeps what it multiplied with, without any adapter, too
    assert kept == (0 if made.rounds_input else own)
    assert len(reads) == 1
    y.sum().backward()
    assert len(reads) == (3 if made.rounds_input else 2)  # one for the base's own gradient
    with torch.no_grad(), one_call(Gate()):
        layer.eval()(x)
        layer(x)
        assert not any("bat-col" in key for kept in CURRENT.kept.values() for key in kept.values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_of_a_mixed_batch_has_the_output_of_its_own_adapter(backend):
    made = quantised_linear(backend)
    layer, x = adapted(made, R, "bat-col", "bone").eval(), torch.randn(4, 3, IN)
    got = layer(x, adapter_names=["bone", "bat-col", "__base__", "bone"])
    wanted = [made.layer(x[2:3])]
    for name, rows in (("bone", [0, 3]), ("bat-col", [1])):
        layer.set_adapter(name)
        wanted.append(layer(x[rows]))
    tolerance = 2e-2 if made.rounds_input else 3e-6
    assert relative_error(got[[2, 0, 3, 1]], torch.cat(wanted)) <= tolerance


def run_and_kept(layer, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The output, and how many weight-sized float tensors were kept for backward."""
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    return y, sum(t.is_floating_point() and t.numel() >= OUT * IN for t in kept)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("bnb")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_fp32_adapters_train_on_half_precision_activations(backend, dtype, name):
    made = quantised_linear(backend)
    if hasattr(made.layer, "compute_dtype"):
        made.layer.compute_dtype = dtype
    layer = adapted(made, R, name)
    x = torch.randn(4, IN, dtype=dtype, requires_grad=True)
    got = layer(x)
    assert got.dtype == dtype
    block = layer.bone_block[name]
    want = reference.forward(x, layer.base_kind.weight(made.layer), made.layer.bias, [(name, block, 1.0)])
    assert close(got, want)
    grads = [torch.autograd.grad(y.sum(), [x, block]) for y in (got, want)]
    assert grads[0][1].dtype == torch.float32
    assert close(grads[0][0], grads[1][0])
    assert close(grads[0][1], grads[1][1], dtype)


def test_evaluating_a_4_bit_model_before_training_leaves_its_gradients_whole():
    """On CPUs with AVX512-BF16 bitsandbytes rewrites layers that are called in eval mode, for good."""
    from peft import BoneConfig, get_peft_model

    model = torch.nn.Sequential(*(quantised_linear("bnb nf4 double", 64, 64, bias=False).layer for _ in range(3)))
    x = torch.randn(5, 64)
    with torch.no_grad():
        want = model(x)
        model.eval()(x)  # before there is an adapter
    model = get_peft_model(model, BoneConfig(r=8, target_modules=["0"], variant="bat-col"))
    with torch.no_grad():
        assert relative_error(model.eval()(x), want) < 1e-2  # scales were rounded to bf16
    model.train()(x).square().sum().backward()
    assert model.base_model.model[0].bone_block["default"].grad.abs().max() > 0


def test_a_4_bit_layer_that_nobody_evaluated_is_not_changed_by_evaluation():
    from peft import BoneConfig, get_peft_model

    model = torch.nn.Sequential(quantised_linear("bnb nf4", 64, 64).layer)
    x = torch.randn(5, 64)
    with torch.no_grad():
        want = model(x)
        model = get_peft_model(model, BoneConfig(r=8, target_modules=["0"])).eval()
        assert same_bits(model(x), want, Promise.EXACT)


def test_a_quantised_embedding_is_refused_by_name():
    import bitsandbytes as bnb

    model = torch.nn.Sequential(bnb.nn.EmbeddingNF4(64, 64).to("cpu"))
    with pytest.raises(ConfigError, match="0: target module cannot be adapted, it is a quantised EmbeddingNF4"):
        get_peft_model(model, BoneConfig(r=4, target_modules=["0"]))


COMPILED = """
import sys, torch, flashbone
sys.path.append(sys.argv[1])
from helpers.comparison import close
from helpers.quantised import adapted, quantised_linear

for variant in ("bat-col", "bone"):
    layer = adapted(quantised_linear("bnb nf4"), 10, variant)
    x, block = torch.randn(5, 64), layer.bone_block[variant]
    runs = layer, torch.compile(layer, backend="eager")
    want, got = (torch.autograd.grad(run(x).square().sum(), block)[0] for run in runs)
    assert close(got, want) and want.abs().max() > 0
print("compiled")
"""


def test_a_compiled_4_bit_layer_gives_the_same_gradients():
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-W", "ignore", "-c", COMPILED, str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("compiled\n"), done.stderr
