"""BONE next to LoRA: PeftMixedModel refuses it by name, and the way that it names instead adds both up."""

import pytest
import torch
from peft import (
    BoneConfig,
    LoraConfig,
    PeftMixedModel,
    get_peft_model,
    inject_adapter_in_model,
)
from transformers import AutoModelForCausalLM

from flashbone.errors import ConfigError
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import MLP
from helpers.transformers_peft import needs_transformers_own_adapters

SIZES = (13, 9, 6)
ROWS = torch.randn(4, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

# peft about a second adapter on a model; it is what these tests do
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


def bone(variant: str = "bone") -> BoneConfig:
    return BoneConfig(r=4, variant=variant, mini_r=2, init_weights=False, target_modules=["lin0"])


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False)


def test_a_mixed_model_refuses_bone_wherever_it_could_come_in(tmp_path):
    get_peft_model(MLP(SIZES), bone()).save_pretrained(tmp_path)
    mixed = get_peft_model(MLP(SIZES), lora(), mixed=True)
    want = mixed(ROWS)
    base = MLP(SIZES)
    for put in (
        lambda: get_peft_model(base, bone(), mixed=True),
        lambda: PeftMixedModel.from_pretrained(base, tmp_path),
        lambda: mixed.add_adapter("bone", bone()),
        lambda: mixed.load_adapter(tmp_path, "bone"),
    ):
        with pytest.raises(
            ConfigError, match=r"PeftMixedModel .* BONE .* put .* the BONE adapter first, then the others"
        ):
            put()
    assert type(base.lin0) is torch.nn.Linear
    assert list(mixed.peft_config) == ["default"]
    assert same_bits(mixed(ROWS), want, Promise.SAME_PRODUCT)


def test_mixed_models_of_other_methods_load_as_without_flashbone(tmp_path):
    saved = get_peft_model(MLP(SIZES), lora())
    saved.save_pretrained(tmp_path)
    mixed = PeftMixedModel.from_pretrained(MLP(SIZES), tmp_path, "one")
    mixed.load_adapter(tmp_path, "two")
    mixed.set_adapter("two")
    assert same_bits(mixed(ROWS), saved(ROWS), Promise.SAME_PRODUCT)


def outputs(layer: torch.nn.Module, names: list[str]) -> torch.Tensor:
    """Of a layer with a LoRA around a Bone adapter, or the other way round, with these adapters active."""
    for module in (layer, layer.base_layer):
        module.enable_adapters(bool(names))
        module.set_adapter(names)
    return layer(ROWS.float())


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_bone_first_and_lora_around_it_add_up(variant):
    model = MLP(SIZES, torch.float32)
    inject_adapter_in_model(bone(variant), model, "bone")
    inject_adapter_in_model(lora(), model, "lora")
    plain, one, other, both = (outputs(model.lin0, names) for names in ([], ["bone"], ["lora"], ["bone", "lora"]))
    assert same_bits(plain, MLP(SIZES, torch.float32).lin0(ROWS.float()), Promise.SAME_PRODUCT)
    assert (one - plain).norm() > 0.1
    assert (other - plain).norm() > 0.1
    assert close(both - plain, (one - plain) + (other - plain))


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_lora_first_adds_up_or_is_refused(variant):
    model = MLP(SIZES, torch.float32)
    inject_adapter_in_model(lora(), model, "lora")
    want = model(ROWS.float())
    if variant in ("bat-row", "orthogonal"):  # they shift the input of the layer, and with it that of the LoRA inside
        with pytest.raises(ConfigError, match=rf"lin0: its peft.tuners.lora\S+ adapter would see .* {variant} shifts"):
            inject_adapter_in_model(bone(variant), model, "bone")
        assert list(model.peft_config) == ["lora"]
        assert same_bits(model(ROWS.float()), want, Promise.SAME_PRODUCT)
        return
    inject_adapter_in_model(bone(variant), model, "bone")
    plain, one, other, both = (outputs(model.lin0, names) for names in ([], ["bone"], ["lora"], ["bone", "lora"]))
    assert close(both - plain, (one - plain) + (other - plain))


@needs_transformers_own_adapters
def test_bone_and_lora_are_trained_and_saved_side_by_side_on_a_transformers_model(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.add_adapter(BoneConfig(r=8, variant="bat-row", target_modules=["q_proj", "up_proj"]), "bone")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "lora")
    model.set_adapter(["bone", "lora"])
    tokens = torch.arange(9)[None]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    for _ in range(2):  # a LoRA's A moves in the second step only
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "bone_block" in name or "lora_" in name}
    want = model(tokens).logits
    for name in ("bone", "lora"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
    again = AutoModelForCausalLM.from_pretrained(llama)
    for name in ("bone", "lora"):
        again.load_adapter(str(tmp_path / name), name)
    again.set_adapter(["bone", "lora"])
    assert close(again(tokens).logits, want)
