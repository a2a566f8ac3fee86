"""torch.compile takes an adapted layer as one graph. In its own process: the tests' shape checks do not compile."""

import subprocess
import sys

CODE = """
import torch, flashbone
from flashbone import BoneLinear

ALONE = [("bone",), ("mini",), ("bat-row",), ("bat-col",)]
for variants in [*ALONE, ("bat-row", "bone", "bat-col")]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = BoneLinear(torch.nn.Linear(13, 11, dtype=torch.float64), "0", 3, False, variant=variants[0], mini_r=2)
    for i, variant in enumerate(variants[1:], 1):
        layer.update_layer(str(i), 3 + i, False, variant=variant)
    layer.set_adapter([str(i) for i in range(len(variants))])
    x = torch.randn(4, 13, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.bone_block.values()])])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*results, strict=True)), variants
    assert all(grad.abs().max() > 1e-3 for grad in results[1]), variants
print("compiled")
"""


def test_every_variant_compiles_as_one_graph_with_equal_outputs_and_gradients():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "compiled\n"
