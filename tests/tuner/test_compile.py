"""torch.compile takes an adapted layer as one graph. In its own process: the tests' shape checks do not compile."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

CODE = """
import sys, torch, flashbone
from flashbone import BoneLinear

backend = sys.argv[1]
ALONE = [("bone",), ("mini",), ("bat-row",), ("bat-col",), ("orthogonal",)]


def make(variants, out, in_, r, **kwargs):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = BoneLinear(torch.nn.Linear(in_, out, **kwargs).requires_grad_(False), "0", r, False, variant=variants[0],
                       mini_r=2)
    for i, variant in enumerate(variants[1:], 1):
        layer.update_layer(str(i), r + i, False, variant=variant)
    layer.bone_block.to(**kwargs)
    layer.set_adapter([str(i) for i in range(len(variants))])
    return layer, torch.compile(layer, backend=backend, fullgraph=True)


# One graph for training and one for inference each, ragged sizes; the mixture sees an input that is not contiguous.
for variants in [*ALONE, ("bat-row", "bone", "bat-col")]:
    layer, compiled = make(variants, 99, 130, 16, dtype=torch.float64)
    x = torch.randn(2, 6, 130, dtype=torch.float64) if len(variants) == 1 else torch.randn(130, 4).double().T
    x.requires_grad_()
    weights, kept, results = {layer.base_layer.weight.untyped_storage().data_ptr()}, {}, []

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 8
        return t

    for run in (layer, compiled):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.bone_block.values()])])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*results, strict=True)), variants
    assert all(grad.abs().max() > 1e-3 for grad in results[1]), variants
    # Nothing that is as large as the weight is kept between forward and backward, as in eager mode.
    assert 0 < sum(kept.values()) < 99 * 130 * (1 if len(variants) == 1 else 2) * 0.6, (variants, kept)
    layer.eval()
    with torch.no_grad():
        for _ in range(2):
            layer(x)  # fills the cache, of which the compiled layer knows nothing
            assert torch.allclose(compiled(x), results[0][0], rtol=1e-12, atol=1e-12), variants
            layer.bone_block["0"].mul_(2)
            results[0][0] = layer(x)
for variants in ALONE:
    layer, _ = make(variants, 11, 13, 3, dtype=torch.float64)
    x = torch.randn(2, 13, dtype=torch.float64)
    assert torch.allclose(torch.jit.trace(layer, x)(x), layer(x), rtol=1e-12, atol=1e-12), variants
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_variant_compiles_as_one_graph_with_equal_outputs_and_gradients(backend, tmp_path):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    if backend == "inductor" and " " in torch.__file__:
        pytest.skip("Inductor does not quote torch's own path for the linker: it cannot have a space")
    own = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, backend], cwd=tmp_path, env=own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "compiled\n"
