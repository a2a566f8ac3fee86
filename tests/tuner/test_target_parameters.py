"""`target_parameters`: fused experts, with a block for each, and single matrices."""

import copy

import pytest
import torch
import transformers as hf
from peft import BoneConfig, PeftModel, get_peft_model
from torch import nn

from flashbone.errors import ConfigError, FormatError
from flashbone.files import peft as checkpoint
from flashbone.inspect.adapter import inspect_adapter
from flashbone.inspect.model import inspect_model
from flashbone.merge import merge_checkpoint
from flashbone.tuner.layers.parameters import ParamWrapper
from flashbone.tuner.model.targets import TargetError
from helpers.adapter_folders import tiny_llama
from helpers.blocks import VARIANT_NAMES
from helpers.checkpointing import enable_checkpointing
from helpers.comparison import Promise, close, same_bits
from helpers.layers import adapted, check_lifecycle, gradients, oracle_weight

EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
SIZES = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 4}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
MODELS = {
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {"num_local_experts": 3}),
    "qwen3-moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, {"num_experts": 3, "moe_intermediate_size": 12}),
    "gpt-oss": (hf.GptOssForCausalLM, hf.GptOssConfig, {"num_local_experts": 3, "pad_token_id": None}),
}


def make(name: str, how: str = "eager") -> nn.Module:
    kind, config, fields = MODELS[name]
    torch.manual_seed(1)
    model = kind(config(**SIZES, **fields, experts_implementation=how))
    for name, parameter in model.named_parameters():
        if "experts." in name:
            parameter.data.normal_(std=0.5)
    return model.eval()


def run(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6) * 7 % 30
    return model(ids).logits.detach()


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_output_and_gradients_are_those_of_shifted_experts(name, variant):
    base = make(name).double().model.layers[0].mlp.experts
    model = adapted(nn.ModuleDict({"experts": copy.deepcopy(base)}), variant, **EXPERTS)
    blocks = {n.split(".")[-2:][0] + str(i): p for i, (n, p) in enumerate(model.named_parameters()) if p.requires_grad}
    inner, outer = list(blocks.values())
    wanted = [block.detach().clone().requires_grad_(True) for block in (inner, outer)]
    values = {}
    for parameter, block in zip(("gate_up_proj", "down_proj"), wanted, strict=True):
        W = getattr(base, parameter)
        shifted = oracle_weight(W.mT if base.is_transposed else W, variant, block)
        values[parameter] = shifted.mT if base.is_transposed else shifted
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    routes = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]]), torch.rand(5, 2, dtype=torch.float64)
    got = model.base_model.model["experts"](x, *routes)
    want = torch.func.functional_call(base, values, (x, *routes))
    assert close(got, want)
    for g, w in zip(gradients(got, [x, inner, outer]), gradients(want, [x, *wanted]), strict=True):
        assert close(g, w)
    assert all(type(p) is nn.Parameter for p in base.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_mixed_adapters_live_as_on_a_linear_layer(name, tmp_path):
    base = make(name).double()
    for pair in (("bone", "bat-col"), ("orthogonal", "mini"), ("bat-row", "bone")):
        model = adapted(copy.deepcopy(base), *pair, **EXPERTS)
        check_lifecycle(model, run, lambda: copy.deepcopy(base), tmp_path / pair[0])


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_real_models_train_with_every_implementation_of_experts(how, checkpointing):
    losses = []
    for kind in ("eager", how):
        model = adapted(make("qwen3-moe", kind), "bone", **EXPERTS, target_modules=["q_proj"]).train()
        if checkpointing and kind == how:
            enable_checkpointing(model.base_model.model)
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ids = torch.arange(12).view(2, 6) * 7 % 30
        for _ in range(3):
            loss = model(ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
            optimiser.step()
            optimiser.zero_grad()
    assert close(torch.stack(losses[3:]), torch.stack(losses[:3]), torch.float32)
    assert losses[2] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    experts = nn.ModuleDict({"experts": make("mixtral").model.layers[0].mlp.experts}).to(dtype)
    model = adapted(experts, "bone", "bat-row", **EXPERTS)
    x, routes = torch.randn(5, 8, dtype=dtype), (torch.tensor([[0, 1]] * 5), torch.rand(5, 2, dtype=dtype))
    got = model.base_model.model["experts"](x, *routes)
    assert got.dtype == dtype
    assert close(got, model.merge_and_unload()["experts"](x, *routes), torch.bfloat16)


def test_files_name_the_parameter_and_how_it_is_stored(tmp_path):
    for name, suffix in (("mixtral", "bone_block"), ("gpt-oss", "bone_transposed")):
        model = adapted(make(name), "bat-row", **EXPERTS)
        model.save_pretrained(tmp_path / name, selected_adapters=["x"])
        held = checkpoint.read(tmp_path / name / "x")
        assert "model.layers.1.mlp.experts.gate_up_proj" in held.parameters == frozenset(held.blocks)
        assert bool(held.transposed) == (suffix == "bone_transposed")
        described = inspect_adapter(tmp_path / name / "x")
        assert {group.r for group in described.blocks} == {3}
        assert all(engine.verdict == "no" for engine in described.engines)


def test_files_of_fused_experts_merge_bit_for_bit(tmp_path):
    base = make("gpt-oss")
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, "bat-row", **EXPERTS, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["x"])
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter" / "x", tmp_path / "out")
    merged = type(base).from_pretrained(tmp_path / "out").state_dict()
    assert report.merged == 6
    live = model.merge_and_unload().state_dict()
    assert all(same_bits(merged[name], live[name], Promise.SAME_PRODUCT) for name in live)


def test_files_of_separate_experts_are_refused_with_the_way_out(tmp_path):
    make("mixtral").save_pretrained(tmp_path / "base")
    adapted(make("mixtral"), "bone", **EXPERTS).save_pretrained(tmp_path / "adapter", selected_adapters=["x"])
    with pytest.raises(FormatError, match=r"experts.gate_up_proj: not in the base, which may keep every expert by it"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter" / "x", tmp_path / "out")


def test_inspecting_a_model_says_that_it_counts_linear_layers_only(tmp_path):
    make("mixtral").config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"experts.gate_up_proj, .* target_parameters; leave them out"):
        inspect_model(tmp_path, {"r": 2, "target_modules": [], **EXPERTS})


def test_adapters_on_different_parameters_of_one_module_add_up(tmp_path):
    model = adapted(make("mixtral").double(), "bone", target_parameters=["experts.down_proj"])
    model.add_adapter("y", BoneConfig(r=2, variant="bat-row", init_weights=False, **EXPERTS))
    model.base_model.set_adapter(["x", "y"])
    got = run(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("mixtral").double(), tmp_path / "y", "y")
    again.load_adapter(tmp_path / "x", "x")
    again.base_model.set_adapter(["x", "y"])
    assert close(run(again), got)
    model.delete_adapter("x")
    assert not close(run(model), got)
    again.delete_adapter("x")
    assert close(run(again), run(model))


def test_sums_of_adapters_are_exact():
    model = adapted(make("gpt-oss").double(), "bone", "bone", **EXPERTS, target_modules=["q_proj"])
    want = run(model)
    model.base_model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert model.peft_config["sum"].r == 6
    assert close(run(model), want)


def test_originals_can_be_dropped_and_are_computed_back():
    for variant in VARIANT_NAMES:
        model = adapted(make("mixtral").double(), variant, **EXPERTS)
        model.base_model.keep_originals(False)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.merge_adapter()
        model.unmerge_adapter()
        assert all(close(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_parameters": "experts.down_proj"},
            "target_parameters: got 'experts.down_proj', wanted a list of n",
        ),
        (EXPERTS | {"dropout": 0.1}, "dropout=0.1 cannot be applied to target_parameters"),
        (EXPERTS | {"layers_to_transform": [0]}, "layers_to_transform does not choose among target_parameters; write"),
        (
            {"target_parameters": ["experts.up"]},
            "no matrix or stack of matrices 'experts.up'; it has .*experts.gate_u",
        ),
        ({"target_parameters": ["q_proj.weight"]}, "it is the weight of a Linear, which target_modules adapts"),
        (
            {"target_modules": ["experts"]},
            "it is a MixtralExperts; its gate_up_proj, down_proj can be named in targe",
        ),
    ],
)
def test_what_cannot_be_done_with_parameters_is_refused_by_name(fields, message):
    model = make("mixtral")
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, BoneConfig(r=2, **fields))
    assert not any(isinstance(module, ParamWrapper) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_recurrent_layers_and_vectors_are_refused_by_name():
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4)})
    with pytest.raises(TargetError, match=r"rnn.weight_hh_l0: a LSTM keeps a second copy of its weights"):
        get_peft_model(model, BoneConfig(r=2, target_parameters=["weight_hh_l0"]))
    with pytest.raises(TargetError, match="no matrix or stack of matrices 'bias_hh_l0'"):
        get_peft_model(model, BoneConfig(r=2, target_parameters=["bias_hh_l0"]))


def test_rows_with_adapters_of_their_own_are_refused():
    model = adapted(make("mixtral"), "bone", **EXPERTS).eval()
    with pytest.raises(ConfigError, match="ParamWrapper shifts one weight for all rows of a batch"):
        model(torch.zeros(2, 3, dtype=torch.long), adapter_names=["x", "__base__"])


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path):
    adapted(make("mixtral"), "bone", **EXPERTS).save_pretrained(tmp_path, selected_adapters=["x"])
    other = tiny_llama()
    with pytest.raises(TargetError, match=r"no matrix or stack of matrices 'experts.gate_up_proj'"):
        PeftModel.from_pretrained(other, tmp_path / "x")
    wide = MODELS["mixtral"]
    base = wide[0](wide[1](**SIZES | {"hidden_size": 12}, num_local_experts=3))
    with pytest.raises(ValueError, match=r"does not fit this model: .*bone adapter has a block of shape \(3, 3, 12\)"):
        PeftModel.from_pretrained(base, tmp_path / "x")
    assert not any(isinstance(module, ParamWrapper) for module in base.modules())


def test_no_module_is_adapted_unless_it_is_named():
    model = adapted(make("mixtral"), "bone", **EXPERTS)
    assert {type(m).__name__ for m in model.modules() if hasattr(m, "bone_block")} == {"ParamWrapper"}
    assert "'gate_up_proj', x: bone r=3" in repr(model)
    assert copy.deepcopy(model).base_model.model.model.layers[0].mlp.experts.gate_up_proj.shape == (3, 24, 8)
