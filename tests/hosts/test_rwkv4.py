"""transformers' own RWKV (version 4): refused where it rescales weights in place, right with rescale_every=0."""

import pytest
import torch
from peft import BoneConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import RwkvConfig, RwkvForCausalLM

from flashbone import BoneLayer
from flashbone.errors import ConfigError
from flashbone.tuner.model.targets import resolved
from helpers import reference
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import fill_blocks

pytestmark = pytest.mark.slow

VARIANTS = ["bone", "mini", "bat-row", "bat-col", "orthogonal"]
NAMES = ["attention.receptance", "attention.key", "attention.value", "attention.output"]
NAMES += ["feed_forward.key", "feed_forward.receptance", "feed_forward.value"]
LAYERS = 3
TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])


def base_model(seed: int = 0, every: int = 0) -> RwkvForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "context_length": 16}
    tokens = {"bos_token_id": 1, "eos_token_id": 29}
    return RwkvForCausalLM(RwkvConfig(num_hidden_layers=LAYERS, rescale_every=every, **sizes, **tokens))


def config(variant: str = "bone", targets: list[str] | str = NAMES, **fields) -> BoneConfig:
    mini = {"mini_r": 2} if variant == "mini" else {}
    return BoneConfig(r=4, variant=variant, target_modules=targets, **mini, **fields)


def adapted(variant: str = "bone", base: nn.Module | None = None, **fields) -> PeftModel:
    model = get_peft_model(base_model() if base is None else base, config(variant, **fields))
    fill_blocks(model)
    return model


def layers(model: PeftModel) -> dict[str, BoneLayer]:
    named = model.base_model.model.named_modules()
    return {name: module for name, module in named if isinstance(module, BoneLayer)}


def run(model: nn.Module, train: bool = False) -> Tensor:
    with torch.no_grad():
        return model.train(train)(TOKENS).logits


def by_hand(model: PeftModel) -> RwkvForCausalLM:
    """A model of transformers alone whose weights are the sums W + delta(W)."""
    summed = base_model()
    for name, layer in layers(model).items():
        weight, block = summed.get_submodule(name).weight, layer.bone_block["default"]
        weight.data += reference.delta(layer.bone_variant["default"].name, weight.detach(), block.detach()).to(weight)
    return summed


def test_names_all_linear_and_nothing_mean_the_layers_of_all_blocks():
    wanted = {f"rwkv.blocks.{i}.{name}" for i in range(LAYERS) for name in NAMES}
    for targets in (NAMES, "all-linear", None, ["all-attention", "all-mlp"], ["receptance", "key", "value", "output"]):
        assert set(resolved(base_model(), config(targets=targets))) == wanted
        assert set(layers(get_peft_model(base_model(), config(targets=targets)))) == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss_and_changes_nothing_but_the_blocks(variant):
    model = get_peft_model(base_model(), config(variant)).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(4):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        run(model)  # an evaluation in between, after which training goes on
        model.train()
    assert losses[-1] < losses[0] - 0.05
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"base_model.model.{name}.bone_block.default" for name in layers(model)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_summed_weights_in_either_mode(variant):
    model = adapted(variant)
    summed = by_hand(model)
    for train in (False, True, False):
        assert close(run(model, train), run(summed, train))
    assert not close(run(model), run(base_model()))


@pytest.mark.parametrize("was_called", [False, True])
def test_a_model_that_rescales_its_weights_is_refused_with_the_remedy(was_called):
    base = base_model(every=2)
    want = run(base) if was_called else None
    with pytest.raises(ConfigError, match=r"RwkvModel divides its weights .* rescale_every=0"):
        get_peft_model(base, config())
    assert not any(isinstance(module, BoneLayer) for module in base.modules())
    assert want is None or same_bits(run(base), want, Promise.SAME_PRODUCT)


def test_files_load_and_merging_keeps_the_outputs(tmp_path):
    model = adapted("bat-row")
    want = run(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert same_bits(run(loaded), want, Promise.SAME_PRODUCT)
    assert close(run(loaded.merge_and_unload()), want)
