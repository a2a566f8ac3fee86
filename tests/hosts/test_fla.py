"""flash-linear-attention's RWKV-7 and RWKV-6: adapters by names and roles, merged weights, and outputs by its kernels,
interpreted on the CPU (`make test-fla`)."""

import builtins
import importlib
import os
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on import it says that it finds no GPU
    pytest.importorskip("fla.models", reason="flash-linear-attention is not installed here; `make test-fla` brings it")

import torch
import triton
from fla.models import RWKV6Config, RWKV6ForCausalLM, RWKV7Config, RWKV7ForCausalLM
from peft import BoneConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flashbone import BoneLayer
from flashbone.rwkv import Rwkv6Config, Rwkv7Config, kernels, wkv6, wkv7
from flashbone.tuner.model.targets import resolved, roles_of
from helpers import reference
from helpers.comparison import Promise, close, relative_error, same_bits
from helpers.mlp import fill_blocks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 (make test-fla)")
pytestmark = [
    pytest.mark.filterwarnings("ignore:According to Bo:UserWarning"),  # its word on its RWKV, at each layer
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # where kernels mask
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch, compiling its functions
]
IN_FP32 = pytest.mark.filterwarnings("ignore:ChunkDeltaRuleFunction does not support float32:RuntimeWarning")

WKV = {7: wkv7, 6: wkv6}
VARIANTS = ["bone", "mini", "bat-row", "bat-col", "orthogonal"]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 30, "fuse_norm": False}
RANKS = {f"{name}_low_rank_dim": 8 for name in ("decay", "gate", "a", "v")}
MODELS = {
    7: lambda: RWKV7ForCausalLM(RWKV7Config(head_dim=32, **RANKS, **SIZES)),
    6: lambda: RWKV6ForCausalLM(RWKV6Config(num_heads=2, proj_low_rank_dim=8, gate_low_rank_dim=8, **SIZES)),
}
NAMES = {
    7: ["r_proj", "k_proj", "v_proj", "o_proj", "ffn.key", "ffn.value"],
    6: ["r_proj", "k_proj", "v_proj", "o_proj", "ffn.key", "ffn.value", "ffn.receptance"],
}
# Role -> what holds it in a layer, for each version.
ROLES = {
    7: {
        "attention.query": "attn.r_proj",
        "attention.key": "attn.k_proj",
        "attention.value": "attn.v_proj",
        "attention.output": "attn.o_proj",
        "mlp.up": "ffn.key",
        "mlp.down": "ffn.value",
    },
    6: {
        "attention.query": "attn.r_proj.linear",
        "attention.key": "attn.k_proj.linear",
        "attention.value": "attn.v_proj.linear",
        "attention.output": "attn.o_proj",
        "mlp.up": "ffn.key.linear",
        "mlp.gate": "ffn.receptance.linear",
        "mlp.down": "ffn.value",
    },
}
TOKENS = torch.tensor([[3, 14, 15, 9, 2], [6, 5, 3, 5, 8]])


class _NoDevice:
    """What Triton's autotuner asks for times; there are none in the interpreter, so that it takes the first choice."""

    def get_benchmarker(self):
        return lambda call, quantiles=None: [1.0, 1.0, 1.0]


class _Index(int):
    """An index of a loop, as a kernel that is compiled has it."""

    def to(self, dtype):
        return self


def _indices(*bounds):
    return map(_Index, builtins.range(*map(int, bounds)))


DPLR = "fla.ops.generalized_delta_rule.dplr"


@pytest.fixture(scope="module", autouse=True)
def _interpretable():
    """What the interpreter lacks: a device, tensors as indices of loops, and `gather`, without which fla has a way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", _NoDevice())
        for name in ("fla.ops.common.chunk_h", "fla.ops.rwkv6.chunk", f"{DPLR}.chunk_h_fwd", f"{DPLR}.chunk_h_bwd"):
            patch.setattr(importlib.import_module(name), "range", _indices, raising=False)
        for name in (f"{DPLR}.chunk_A_fwd", f"{DPLR}.chunk_A_bwd"):
            patch.setattr(importlib.import_module(name), "IS_GATHER_SUPPORTED", False)
        yield


def base_model(version: int) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[version]()
    for name, parameter in model.named_parameters():  # some start at zero, among them whole layers
        if name.endswith(("o_proj.weight", "ffn.value.weight", "lora.0.weight")):
            nn.init.normal_(parameter, std=0.1)
    return model


def config(version: int, variant: str = "bone", **fields) -> BoneConfig:
    mini = {"mini_r": 4} if variant == "mini" else {}
    return BoneConfig(**{"r": 8, "variant": variant, "target_modules": NAMES[version]} | mini | fields)


def adapted(version: int, variant: str = "bone", **fields) -> PeftModel:
    model = get_peft_model(base_model(version), config(version, variant, **fields))
    fill_blocks(model)
    return model


def layers(model: nn.Module) -> dict[str, BoneLayer]:
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    return {name: module for name, module in inner.named_modules() if isinstance(module, BoneLayer)}


def of_layers(*names: str) -> set[str]:
    return {f"model.layers.{i}.{name}" for i in range(2) for name in names}


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def by_hand(model: PeftModel, version: int) -> nn.Module:
    """A model of flash-linear-attention alone whose weights are the sums W + delta(W)."""
    summed = base_model(version)
    for name, layer in layers(model).items():
        weight, block = summed.get_submodule(name).weight, layer.bone_block["default"]
        variant = layer.bone_variant["default"].name
        weight.data += reference.delta(variant, weight.detach(), block.detach()).to(weight)
    return summed


@pytest.mark.parametrize("version", [7, 6])
def test_names_and_roles_mean_the_projections(version):
    wanted = of_layers(*ROLES[version].values())
    assert set(layers(get_peft_model(base_model(version), config(version)))) == wanted
    held = roles_of(base_model(version))
    assert {role: set(held[role]) for role in ROLES[version]} == {
        role: of_layers(name) for role, name in ROLES[version].items()
    }
    assert set(resolved(base_model(version), config(version, target_modules=["all-attention", "all-mlp"]))) == wanted


def test_all_linear_takes_the_low_rank_layers_of_version_7_as_well():
    model = get_peft_model(base_model(7), config(7, target_modules="all-linear"))
    inner = {f"attn.{name}_lora.lora.{i}" for name in "wag" for i in (0, 2)}
    wanted = of_layers(*ROLES[7].values(), *inner) | {f"model.layers.1.attn.v_lora.lora.{i}" for i in (0, 2)}
    assert set(layers(model)) == wanted


def test_a_layer_of_version_6_that_is_read_and_never_called_gives_the_shifted_weight():
    model = get_peft_model(base_model(6), config(6, target_modules="all-linear"))
    inner = {
        "attn.x_proj.0.linear",
        "attn.x_proj.2",
        "attn.g_proj.linear",
        *(f"attn.w_proj.linear.lora.{i}" for i in (0, 2)),
    }
    assert set(layers(model)) == of_layers(*ROLES[6].values(), *inner)
    read = {name: layer.weight_reader for name, layer in layers(model).items() if layer.is_only_read}
    assert read == dict.fromkeys(of_layers("attn.x_proj.2"), "RWKV6Attention")


@pytest.mark.parametrize("version", [7, 6])
def test_only_the_blocks_are_trained_and_they_have_the_size_of_the_formula(version):
    model = get_peft_model(base_model(version), config(version))
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"base_model.model.{name}.bone_block.default": (8, layer.out_features) for name, layer in layers(model).items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("version", [7, 6])
def test_merged_weights_are_the_formula_and_unmerging_gives_them_back_bit_for_bit(version, variant, tmp_path):
    model = adapted(version, variant)
    before = {name: layer.base_layer.weight.clone() for name, layer in layers(model).items()}
    summed = by_hand(model, version)
    model.merge_adapter()
    assert all(close(p.base_layer.weight, summed.get_submodule(name).weight) for name, p in layers(model).items())
    model.unmerge_adapter()
    assert all(
        same_bits(layer.base_layer.weight, before[name], Promise.UNTOUCHED) for name, layer in layers(model).items()
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(version), tmp_path).merge_and_unload()
    assert all(close(parameter, summed.get_parameter(name)) for name, parameter in loaded.named_parameters())


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("version", [7, 6])
def test_outputs_are_those_of_the_merged_weights(version, variant):
    model = adapted(version, variant)
    want = run(by_hand(model, version))
    assert close(run(model), want)
    assert not close(run(base_model(version)), want, torch.bfloat16)
    assert close(run(model.merge_and_unload()), want)


@needs_kernels
@IN_FP32
@pytest.mark.parametrize("version", [7, 6])
def test_gradients_reach_every_block_and_a_step_lowers_the_loss(version):
    model = get_peft_model(base_model(version), config(version)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@needs_kernels
@IN_FP32
def test_its_chunked_kernel_gives_what_its_recurrent_one_gives():
    model = base_model(7)
    assert close(model(TOKENS).logits, run(model))  # with gradients the one, without them the other


@needs_kernels
@pytest.mark.parametrize("version", [7, 6])
def test_its_kernel_gives_our_outputs_states_and_gradients(version):
    inputs = kernels._sample(WKV[version], torch.device("cpu"), torch.float32, 16)
    assert kernels._disagreement(WKV[version], inputs) < 2e-5


@needs_kernels
@pytest.mark.parametrize("version", [7, 6])
def test_in_half_precision_its_kernel_is_taken(version):
    """In fp16: the interpreter has no bf16."""
    assert kernels.why_not(WKV[version], torch.device("cpu"), torch.float16, 16) is None


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("config", [Rwkv7Config, Rwkv6Config])
def test_our_model_by_its_kernel_gives_the_logits_of_our_model_by_torch(config):
    model = AutoModelForCausalLM.from_config(
        config(vocab_size=30, hidden_size=32, head_size=16, num_hidden_layers=2, wkv_backend="fla")
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    got = model(TOKENS).logits
    model.config.wkv_backend = "torch"
    want = model(TOKENS).logits
    assert not torch.equal(got, want)
    assert relative_error(got, want) < 2e-5
