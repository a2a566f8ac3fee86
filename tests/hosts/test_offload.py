"""Models whose weights accelerate keeps in host memory or on disk: the same results as of the plain model.

The device that computes is the CPU, too; the weights are on the meta device between calls all the same.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils import offload_state_dict
from accelerate.utils.modeling import get_state_dict_offloaded_model
from peft import BoneConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from flashbone.errors import ConfigError
from flashbone.tuner.layers.calls import CURRENT, Gate, one_call
from helpers.adapter_folders import tiny_gpt2, tiny_llama
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import fill_blocks

TOKENS = torch.arange(10).view(2, 5)
SPLIT = {"model": "disk", "lm_head": "cpu"}


def config(variant: str, **fields) -> BoneConfig:
    return BoneConfig(r=6, variant=variant, mini_r=4, **{"target_modules": ["q_proj", "down_proj"], **fields})


def adapted(base: nn.Module, variant: str, **fields) -> nn.Module:
    model = get_peft_model(base, config(variant, **fields))
    fill_blocks(model)
    return model


def offloaded(model: nn.Module, where: str, folder) -> nn.Module:
    if where == "cpu":
        return cpu_offload(model, torch.device("cpu"))
    return disk_offload(model, folder / "offloaded", torch.device("cpu"))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # dropout
    model.train()(input_ids=TOKENS).logits.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama()


@pytest.fixture(scope="module")
def saved_llama(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    return folder


@pytest.fixture
def plain(llama):
    """The same model, adapted, with its weights where they were."""
    return lambda variant: adapted(copy.deepcopy(llama), variant)


@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`:UserWarning")  # transformers 5.12
@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_adapter_on_an_offloaded_model_trains_and_generates_as_on_a_plain_one(
    where, variant, llama, plain, tmp_path
):
    model, want = adapted(offloaded(copy.deepcopy(llama), where, tmp_path), variant), plain(variant)
    assert close(outputs(model), outputs(want))
    grads, wanted = gradients(model), gradients(want)
    assert len(wanted) == 4
    assert grads.keys() == wanted.keys()
    assert all(close(grads[name], wanted[name]) for name in wanted)
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert base.weight.is_meta  # given back
    generate = {"input_ids": TOKENS, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    # The best token leads by 1e-3 at least, a thousand times what rounding moves.
    assert model.eval().generate(**generate).tolist() == want.eval().generate(**generate).tolist()


@pytest.mark.parametrize("variant", ["bone", "bat-col"])
def test_conv1d_is_offloaded_as_linear_is(variant):
    torch.manual_seed(0)
    base, fields = tiny_gpt2(), {"target_modules": ["c_attn"]}
    want = adapted(copy.deepcopy(base), variant, **fields)
    model = adapted(cpu_offload(base, torch.device("cpu")), variant, **fields)
    assert close(outputs(model), outputs(want))
    grads, wanted = gradients(model), gradients(want)
    assert all(close(grads[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_an_adapter_that_is_offloaded_with_its_model_gives_the_same_outputs_and_is_not_trained(
    variant, plain, tmp_path
):
    model, want = offloaded(plain(variant), "cpu", tmp_path), plain(variant)
    assert close(outputs(model), outputs(want))
    assert all(p.is_meta for name, p in model.named_parameters() if "bone_" in name)
    with pytest.raises(ConfigError, match="'default' was offloaded with the model and cannot be trained"):
        model.train()(input_ids=TOKENS)
    model.add_adapter("second", config(variant))  # takes the blocks out of offloading
    assert close(outputs(model), outputs(want))
    assert gradients(model).keys() == gradients(want).keys()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_an_adapter_is_loaded_onto_a_model_on_disk(variant, low_cpu_mem_usage, saved_llama, plain, tmp_path):
    from transformers import LlamaForCausalLM

    want = plain(variant)
    want.save_pretrained(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(saved_llama, device_map=SPLIT, offload_folder=tmp_path / "offload")
    folder, files = tmp_path / "adapter", sorted(tmp_path.rglob("*"))
    model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert close(outputs(model), outputs(want))
    assert gradients(model).keys() == gradients(want).keys()
    model.load_adapter(folder, "again", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("again")
    assert close(outputs(model), outputs(want))
    assert model.hf_device_map == SPLIT
    assert sorted(tmp_path.rglob("*")) == files  # nothing is written


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("where", ["cpu", "disk", "files"])
def test_an_offloaded_model_is_merged_and_unmerged(where, variant, llama, saved_llama, plain, tmp_path):
    from transformers import LlamaForCausalLM

    if where == "files":
        base = LlamaForCausalLM.from_pretrained(saved_llama, device_map=SPLIT, offload_folder=tmp_path / "offload")
    else:
        base = offloaded(copy.deepcopy(llama), where, tmp_path)
    before = (saved_llama / "model.safetensors").read_bytes()
    model, want = adapted(base, variant), outputs(plain(variant))
    model.merge_adapter(safe_merge=True)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.merged
    assert layer.base_layer.weight.is_meta
    assert close(outputs(model), want)
    model.unmerge_adapter()
    held = get_state_dict_offloaded_model(model.get_base_model())
    weights = {name.replace(".base_layer", ""): W for name, W in held.items()}
    assert all(same_bits(weights[name], W, Promise.UNTOUCHED) for name, W in llama.state_dict().items())
    with model.disable_adapter():
        assert close(outputs(model), outputs(llama))  # weights in files lie in memory otherwise
    assert close(outputs(model), want)
    merged = model.merge_and_unload()
    assert not any("bone" in name for name, _ in merged.named_parameters())
    assert close(outputs(merged), want)
    assert (saved_llama / "model.safetensors").read_bytes() == before


def test_a_single_layer_is_merged_without_peft_bringing_its_weight(llama, plain):
    model, want = adapted(cpu_offload(copy.deepcopy(llama), torch.device("cpu")), "bat-col"), plain("bat-col")
    layers = [m.get_base_model().model.layers[0].self_attn.q_proj for m in (model, want)]
    assert close(*(layer.get_delta_weight("default") for layer in layers))
    for layer in layers:
        layer.merge()
    assert close(outputs(model), outputs(want))
    layers[0].unmerge()
    layers[1].unmerge()
    assert close(outputs(model), outputs(want))


def test_weights_in_files_that_peft_cannot_bring_are_refused_and_nothing_is_merged(llama, plain, tmp_path):
    with torch.device("meta"):
        base = tiny_llama()
    offload_state_dict(tmp_path, llama.state_dict())
    base.model.rotary_emb = copy.deepcopy(llama.model.rotary_emb)  # in no file
    base = dispatch_model(base, {"": "disk"}, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    model = adapted(base, "bone")
    assert close(outputs(model), outputs(plain("bone")))
    with pytest.raises(ConfigError, match=r"q_proj: its weight is offloaded to a .dat file, .* `flashbone merge`"):
        model.merge_adapter()
    assert close(outputs(model), outputs(plain("bone")))


@pytest.mark.parametrize("variant", ["bone", "bat-col"])
def test_nothing_is_kept_of_an_offloaded_weight(variant, llama, plain):
    want = plain(variant)
    outputs(want)
    model = cpu_offload(want, torch.device("cpu"))
    outputs(model)
    with torch.no_grad(), one_call(Gate()):
        for _ in range(2):
            model.eval()(input_ids=TOKENS[:1, :1])
        assert not any(kept.values for kept in CURRENT.kept.values())


def test_a_merge_does_not_write_into_the_file_that_weights_are_mapped_from(saved_llama, plain):
    from transformers import LlamaForCausalLM

    before = (saved_llama / "model.safetensors").read_bytes()
    model = adapted(LlamaForCausalLM.from_pretrained(saved_llama), "bat-col")
    model.merge_adapter()
    assert close(outputs(model), outputs(plain("bat-col")))
    model.unmerge_adapter()
    assert (saved_llama / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_blocks_are_made_on_the_meta_device_and_loaded(variant, llama, plain, tmp_path):
    want = plain(variant)
    want.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path, low_cpu_mem_usage=True)
    assert close(outputs(model), outputs(want))
    empty = get_peft_model(copy.deepcopy(llama), config(variant), low_cpu_mem_usage=True)
    assert all(p.is_meta for name, p in empty.named_parameters() if "bone_" in name)


@pytest.mark.parametrize("first", ["adapter", "offload"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_an_offloaded_convolution_gives_the_plain_one_s_outputs_and_gradients(variant, kernel, first):
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Conv2d(6, 5, kernel)), torch.randn(2, 6, 4, 4)
    want = adapted(copy.deepcopy(plain), variant, target_modules=["0"])
    if first == "adapter":
        model = copy.deepcopy(want)
        cpu_offload(model.base_model.model[0].base_layer, torch.device("cpu"))
    else:
        model = adapted(cpu_offload(plain, torch.device("cpu")), variant, target_modules=["0"])
    (block,), (wanted_block,) = ([p for n, p in m.named_parameters() if "bone_block" in n] for m in (model, want))
    for _ in range(2):
        got, wanted = model(x), want(x)
        assert close(got, wanted)
        grads = [torch.autograd.grad(y.square().sum(), b)[0] for y, b in ((got, block), (wanted, wanted_block))]
        assert close(*grads)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i, eoi -> ...eo", x, self.fused)


def test_offloaded_experts_are_refused_by_name():
    model = nn.ModuleDict({"experts": Experts()})
    cpu_offload(model, torch.device("cpu"))
    peft_model = get_peft_model(model, config("bone", target_modules=[], target_parameters=["experts.fused"]))
    with pytest.raises(ConfigError, match=r"the weight of this Experts is sharded or offloaded.*keep the layer"):
        peft_model.base_model.model["experts"](torch.randn(2, 6))


@pytest.mark.parametrize("how", ["swap", "state dict", "weighted"])
def test_adapters_that_were_offloaded_with_their_model_are_written_and_read(llama, how, tmp_path):
    want = adapted(copy.deepcopy(llama), "bone")
    fill_blocks(want, seed=5)
    want.save_pretrained(tmp_path)
    model = cpu_offload(adapted(copy.deepcopy(llama), "bone"), torch.device("cpu"))
    if how == "swap":
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    elif how == "state dict":
        set_peft_model_state_dict(model, get_peft_model_state_dict(want))
    else:
        before = outputs(model)
        model.add_weighted_adapter(["default"], [1.0], "twin")
        model.set_adapter("twin")
        assert close(outputs(model), before)
        return
    assert close(outputs(model), outputs(want))


class Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_an_offloaded_layer_with_a_forward_of_its_own_is_refused_by_name():
    model = adapted(cpu_offload(nn.Sequential(Doubled(6, 5, 3)), torch.device("cpu")), "bat-row", target_modules=["0"])
    with pytest.raises(ConfigError, match="the weight of this Doubled is sharded or offloaded"):
        model(torch.randn(2, 6, 4, 4))
