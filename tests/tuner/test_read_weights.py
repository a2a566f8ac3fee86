"""Hosts that read the weight of a layer, some of which never call it: what they read holds the adapters."""

import copy
import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import transformers as hosts
from peft import BoneConfig, convert_to_lora, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.jamba import modeling_jamba

from flashbone.errors import ConfigError
from flashbone.tuner.layers.layer import bone_layers
from flashbone.tuner.model.weight_reads import uses_of
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import close
from helpers.layers import adapted, gradients, oracle_weight

IDS = torch.arange(12).view(2, 6)
TINY = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
MAMBA_2 = {"num_heads": 4, "head_dim": 8, "state_size": 6, "n_groups": 1, "chunk_size": 4, **TINY}
WAVLM = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
}
JAMBA = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 12, "num_experts": 2, **TINY}
JAMBA |= {"num_hidden_layers": 2, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2}
BERT = {"num_attention_heads": 2, "intermediate_size": 12, "intra_bottleneck_size": 8, "embedding_size": 12, **TINY}
BERT |= {"true_hidden_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BLOOM = {"vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 2, "pretraining_tp": 2, "slow_but_exact": True}
NEXT = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 12, **TINY}
NEXT |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
NEXT |= {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Host(NamedTuple):
    build: Callable[[], nn.Module]
    targets: list[str]
    inputs: dict[str, Tensor] = {"input_ids": IDS}


HOSTS = {
    "TransformerEncoderLayer": Host(Encoder, ["linear1", "linear2"], {"x": torch.linspace(-1, 1, 48).view(2, 4, 6)}),
    "WavLM": Host(
        lambda: hosts.WavLMModel(hosts.WavLMConfig(**WAVLM)),
        ["q_proj", "k_proj", "v_proj", "out_proj"],
        {"input_values": torch.linspace(-1, 1, 400).sin().view(2, 200)},
    ),
    "Mamba": Host(
        lambda: hosts.MambaForCausalLM(hosts.MambaConfig(**TINY)), ["dt_proj", "conv1d", "x_proj", "out_proj"]
    ),
    "FalconMamba": Host(
        lambda: hosts.FalconMambaForCausalLM(hosts.FalconMambaConfig(**TINY)), ["dt_proj", "conv1d", "out_proj"]
    ),
    "Mamba2": Host(lambda: hosts.Mamba2ForCausalLM(hosts.Mamba2Config(**MAMBA_2)), ["conv1d", "out_proj"]),
    "Qwen3-Next": Host(lambda: hosts.Qwen3NextForCausalLM(hosts.Qwen3NextConfig(**NEXT)), ["conv1d"]),
    "MobileBERT": Host(lambda: hosts.MobileBertForMaskedLM(hosts.MobileBertConfig(**BERT)), ["predictions.dense"]),
    "Bloom": Host(lambda: hosts.BloomForCausalLM(hosts.BloomConfig(**BLOOM)), ["dense", "dense_4h_to_h"]),
}
if re.search(r"^ +time_step = self.dt_proj.weight @", inspect.getsource(modeling_jamba), re.M):  # older ones call it
    HOSTS["Jamba"] = Host(lambda: hosts.JambaForCausalLM(hosts.JambaConfig(**JAMBA)), ["dt_proj", "conv1d"])
if hasattr(hosts, "Qwen3_5TextConfig"):
    HOSTS["Qwen3.5"] = Host(lambda: hosts.Qwen3_5ForCausalLM(hosts.Qwen3_5TextConfig(**NEXT)), ["conv1d"])


def output(model: nn.Module, host: Host) -> Tensor:
    result = model(**host.inputs)
    return result if isinstance(result, Tensor) else result[0]


def host_of(name: str) -> tuple[Host, nn.Module]:
    torch.manual_seed(0)
    host = HOSTS[name]
    base = host.build().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # some hosts start where gradients vanish
    return host, base


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("variant", ["bone", "bat-col"])
def test_output_gradient_and_merge_are_those_of_the_shifted_weight(name, variant):
    host, base = host_of(name)
    model = adapted(copy.deepcopy(base), variant, target_modules=host.targets)
    layers = {n: layer for n, layer in bone_layers(model.base_model.model) if layer.weight_reader is not None}
    assert {n.rpartition(".")[2] for n in layers} == {t.rpartition(".")[2] for t in host.targets}
    blocks = [p for p in model.parameters() if p.requires_grad]
    wanted = [block.detach().clone().requires_grad_(True) for block in blocks]
    values = {}
    for (layer_name, layer), block in zip(layers.items(), wanted, strict=True):
        W = layer.get_base_layer().weight
        values[f"{layer_name}.weight"] = oracle_weight(W.flatten(1), variant, block).view(W.shape).to(W.dtype)
    want = torch.func.functional_call(base, values, kwargs=host.inputs)
    want = want if isinstance(want, Tensor) else want[0]
    grads = torch.autograd.grad(want.square().sum(), wanted)
    for training in (True, False):
        got = output(model.train(training), host)
        assert close(got, want, torch.float32)
        for g, w in zip(torch.autograd.grad(got.square().sum(), blocks), grads, strict=True):
            assert w.any()
            assert close(g.float() / w.norm(), w.float() / w.norm(), torch.float16)  # fp32 sums of long recurrences
    with torch.no_grad():  # where hosts take their fast paths
        assert close(output(model, host), want, torch.float32)
        with model.disable_adapter():
            assert close(output(model, host), output(base, host), torch.float32)
        assert close(output(model.merge_and_unload(), host), want, torch.float32)


class Reader(nn.Module):
    """Reads weights in every way that hosts have."""

    def __init__(self) -> None:
        super().__init__()
        self.by_index = nn.Sequential(nn.Tanh(), nn.Linear(6, 6))
        self.in_a_loop = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.in_a_list = nn.ModuleList([nn.Linear(6, 6)])
        self.named, self.helped, self.read_in_eval = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.asked, self.initialised = nn.Linear(6, 6), nn.Linear(6, 6)
        self.table, self.kernel = nn.Embedding(6, 6), nn.Conv1d(6, 6, 1)

    def reset(self) -> None:
        nn.init.ones_(self.initialised.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.by_index[1].weight)
        for layer in self.in_a_loop:
            x = x @ layer.weight.t()
        x = x + sum(F.linear(x, each.weight) for each in self.in_a_list)
        child = self.named
        x = F.linear(x, child.weight, child.bias) @ _table(self) @ self.kernel.weight.squeeze(-1)
        x = self.read_in_eval(x) if self.training else F.linear(x, self.read_in_eval.weight)
        x = self._help(x[..., :])  # a slice of a tensor is no child that is called
        x = x.to(self.asked.weight.dtype).to(self.asked.weight) + self.asked.weight.new_zeros(6)
        return self.initialised(self.asked(x))

    def _help(self, x: Tensor) -> Tensor:
        return F.linear(x, self.helped.weight)


def _table(host: Reader) -> Tensor:
    return host.table.weight


TARGETS = r"by_index\.1|in_.*\.\d|named|helped|read_in_eval|asked|initialised|table|kernel"
X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)


def test_a_read_is_seen_through_names_lists_loops_methods_and_functions():
    model = adapted(Reader().double(), "bone", target_modules=TARGETS)
    layers = dict(bone_layers(model.base_model.model))
    assert {name for name, layer in layers.items() if layer.weight_reader is None} == {"asked", "initialised"}
    called = {name for name, layer in layers.items() if not layer.is_only_read}
    assert called == {"asked", "initialised", "read_in_eval"}
    want = model.train()(X)
    assert close(model.eval()(X), want)
    assert all(g.any() for g in torch.autograd.grad(want.sum(), [p for p in model.parameters() if p.requires_grad]))
    model.merge_adapter()
    assert close(model(X), want)
    assert layers["asked"].weight is layers["asked"].get_base_layer().weight


@pytest.mark.parametrize("model", [hosts.T5Model(hosts.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))])
def test_asking_for_a_dtype_is_no_read(model):
    assert not any(uses_of(type(module)).read for module in model.modules())


def test_a_dropout_that_cannot_act_is_refused():
    with pytest.raises(ConfigError, match=r"by_index\.1: Reader reads the weight .* never calls it, so d"):
        get_peft_model(Reader(), BoneConfig(r=2, dropout=0.1, target_modules=["by_index.1"]))
    model = adapted(Encoder(), "bone", target_modules=["linear1"], dropout=0.5)
    x = HOSTS["TransformerEncoderLayer"].inputs["x"]
    assert not close(model.train()(x), model.eval()(x))  # called in training, read in the fast path
    with torch.no_grad():
        assert close(model(x), model(x.clone().requires_grad_(True)))


def test_a_read_of_one_weight_for_rows_with_several_adapters_is_refused():
    model = adapted(Reader().double(), "bone", target_modules=["read_in_eval"]).eval()
    with pytest.raises(ConfigError, match="shifts one weight for all rows"):
        model(X, adapter_names=["x", "__base__"])


def test_a_layer_that_is_only_read_is_not_converted_to_lora():
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted(Reader(), "bone", target_modules=["named"]), rank=3, adapter_name="x")


def test_outside_of_reading_hosts_the_weight_is_the_parameter_itself():
    model = adapted(nn.Sequential(nn.Linear(4, 4)), "bone", target_modules=["0"])
    layer = model.base_model.model[0]
    assert layer.weight is layer.get_base_layer().weight


class Router(nn.Linear):
    """As Llama 4's and PhiMoE's: it returns a pair."""

    top_k = 2

    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Grouped(nn.Linear):
    """As DeepSeek-V4's: its output has another size than its weight."""

    def forward(self, x):
        return torch.einsum("bgi,goi->bgo", x.view(len(x), 2, 3), self.weight.view(2, 3, -1)[:, :, :3]).flatten(1)


class WithOwnForwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.grouped = Router(6, 6), Grouped(6, 6)
        self.conv, self.table = nn.Conv1d(6, 6, 3, padding=1), nn.Embedding(5, 6, padding_idx=1)

    def forward(self, x):
        ids = torch.full((len(x),), self.table.padding_idx)
        patches = self.conv(x[:, :, None]).flatten(1) * self.conv.kernel_size[0]
        scores, logits = self.router(x + patches + self.table(ids))
        return self.grouped(scores * self.router.top_k + logits)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_linear_layer_with_a_forward_of_its_own_computes_it_with_the_shifted_weight(variant):
    base = WithOwnForwards().double()
    model = adapted(copy.deepcopy(base), variant, target_modules=["router", "grouped"])
    blocks = [p for p in model.parameters() if p.requires_grad]
    wanted = [block.detach().clone().requires_grad_(True) for block in blocks]
    values = {
        f"{name}.weight": oracle_weight(base.get_submodule(name).weight, variant, block)
        for name, block in zip(("router", "grouped"), wanted, strict=True)
    }
    got, want = model(X), torch.func.functional_call(base, values, (X,))
    assert close(got, want)
    for g, w in zip(gradients(got, blocks), gradients(want, wanted), strict=True):
        assert close(g, w)
    assert close(model.merge_and_unload()(X), want)


def test_hosts_see_the_attributes_of_the_base():
    model = adapted(WithOwnForwards().double(), "bone", target_modules=["router", "conv", "table"])
    assert model(X).shape == (2, 6)
    conv = model.base_model.model.conv
    assert (conv.stride, conv.in_channels) == ((1,), 6)
    assert not hasattr(conv, "no_such_attribute")
    with pytest.raises(ConfigError, match="Router has a forward of its own"):
        get_peft_model(WithOwnForwards(), BoneConfig(r=2, dropout=0.1, target_modules=["router"]))
