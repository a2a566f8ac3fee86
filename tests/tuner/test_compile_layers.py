"""torch.compile takes every kind of layer as one graph. In its own process: the tests' shape checks do not compile."""

import subprocess
import sys

import pytest

CODE = """
import torch, flashbone
from torch import nn
from peft import BoneConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1)
mixtral = MixtralConfig(num_hidden_layers=1, num_local_experts=4, experts_implementation="batched_mm", **sizes)
EXPERTS = dict(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
ATTENTION = dict(target_modules=["out_proj"], target_parameters=["in_proj_weight"])


def attention(model, x):
    return model["0"](x, x, x, need_weights=False)[0]


CASES = [
    ("bone", lambda: nn.Conv2d(4, 6, 3), dict(target_modules=["0"]), (2, 4, 6, 6)),
    ("bat-col", lambda: nn.Conv2d(4, 6, 3), dict(target_modules=["0"]), (2, 4, 6, 6)),
    ("bat-row", lambda: nn.Conv1d(4, 6, 1), dict(target_modules=["0"]), (2, 4, 6)),
    ("orthogonal", lambda: nn.MultiheadAttention(6, 2, batch_first=True), ATTENTION, (2, 4, 6)),
    ("bat-row", lambda: MixtralForCausalLM(mixtral).model.layers[0].mlp, EXPERTS, (2, 3, 8)),
    ("mini", lambda: nn.Embedding(24, 6), dict(target_modules=["0"]), None),
]
for variant, make, fields, shape in CASES:
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = BoneConfig(r=3, mini_r=2, variant=variant, init_weights=False, **fields)
    model = get_peft_model(nn.ModuleDict({"0": make()}), config).base_model.model
    call = attention if fields is ATTENTION else lambda model, x: model["0"](x)
    compiled = torch.compile(lambda x: call(model, x), backend="aot_eager", fullgraph=True)
    x = torch.arange(24).view(2, 12) if shape is None else torch.randn(shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for run in (lambda x: call(model, x), compiled):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results, strict=True)), (variant, fields)
    assert all(grad.any() for grad in results[1][1:]), (variant, fields)
print("compiled")
"""


@pytest.mark.slow
def test_every_kind_of_layer_compiles_to_one_graph_with_equal_gradients():
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True)
    assert result.stdout.strip() == "compiled", result.stderr[-2000:]
