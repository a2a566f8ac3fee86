"""Live models to LoRA: `to_lora`, `save_as_lora`, and PEFT's own conversion."""

import copy
import warnings

import pytest
import torch
from peft import (
    BoneConfig,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from flashbone import convert
from flashbone.errors import ConfigError, NonFiniteError
from flashbone.tuner.layers.layer import bone_layers
from helpers.adapter_folders import listing, tiny_bert, tiny_gpt2, tiny_llama
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, relative_error, same_bits

IDS = torch.arange(2, 12).view(2, 5)
EXACT = ("bone", "mini")
TARGETS = {
    tiny_llama: ["q_proj", "v_proj", "down_proj"],
    tiny_gpt2: ["c_attn", "c_proj"],
    tiny_bert: ["query", "value"],  # a query alone moves the logits by little more than rounding
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(maker, **fields) -> tuple[nn.Module, PeftModel]:
    """The bare model, and a copy with a random adapter."""
    bare = maker()
    settings = {"r": 6, "mini_r": 4, "init_weights": False, "target_modules": TARGETS.get(maker)} | fields
    model = get_peft_model(copy.deepcopy(bare), BoneConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "bone_block" not in name:
            parameter.data += torch.randn_like(parameter) / 2
    return bare, model


def with_lora(bare: nn.Module, config, state) -> nn.Module:
    """The bare model with the LoRA, of which PEFT takes every tensor."""
    model = get_peft_model(copy.deepcopy(bare), config).eval()
    assert not set_peft_model_state_dict(model, state).unexpected_keys
    saved = get_peft_model_state_dict(model)  # with bias="all" that has biases of wrappers, too
    assert {key for key in saved if "original_module" not in key and "modules_to_save" not in key} == set(state)
    return model


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("maker", TARGETS)
def test_the_lora_of_a_live_adapter_has_its_logits_and_scale(maker, variant):
    bare, model = adapted(maker, variant=variant)
    plain = logits(model)
    model.base_model.set_scale("default", -0.4)
    want = logits(model)
    config, state = model.to_lora(rank=None if variant in EXACT else 30)
    assert config.r == config.lora_alpha == (6 if variant in EXACT else 30)
    assert not close(plain, want)
    assert close(logits(with_lora(bare, config, state)), want)
    assert same_bits(logits(model), want, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("variant", ["bone", "bat-row"])
def test_merges_and_other_adapters_change_nothing_about_it(variant):
    bare, model = adapted(tiny_llama, variant=variant)
    options = {"adapter_name": "second", "rank": 20}
    model.add_adapter("second", BoneConfig(r=3, init_weights=False, target_modules=["v_proj"], variant=variant))
    model.set_adapter("second")
    want, apart = logits(model), model.to_lora(**options)
    model.base_model.set_adapter(["default", "second"])
    for keep in (True, False):
        model.base_model.keep_originals(keep or variant != "bone")
        model.merge_adapter()
        config, state = model.to_lora(**options)
        model.unmerge_adapter()
        assert config.target_modules == apart[0].target_modules == {"v_proj"}
        assert close(logits(with_lora(bare, config, state)), want)


@pytest.mark.parametrize("bias", ["none", "bone_only", "all"])
def test_biases_and_modules_to_save_come_along(bias):
    fields = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    bare, model = adapted(tiny_bert, bias=bias, **fields)
    config, state = model.to_lora()
    assert "base_model.model.classifier.weight" in state
    assert config.bias == {"bone_only": "lora_only"}.get(bias, bias)
    assert close(logits(with_lora(bare, config, state)), logits(model))


@pytest.mark.parametrize("variant", ["mini", "orthogonal"])
def test_the_saved_folder_is_that_of_the_command(tmp_path, variant):
    bare, model = adapted(tiny_llama, variant=variant)
    bare.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    size = {} if variant == "mini" else {"error": 0.3}
    model.save_as_lora(tmp_path / "live", **size)
    convert(tmp_path / "adapter", tmp_path / "files", "lora", base=tmp_path / "base", **size)
    live, files = (PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / name) for name in ("live", "files"))
    assert live.peft_config["default"].r == files.peft_config["default"].r
    assert live.peft_config["default"].target_modules == files.peft_config["default"].target_modules
    assert close(logits(live), logits(files))


def test_a_saved_lora_has_a_card_and_replaces_an_older_one_whole_or_not_at_all(tmp_path, monkeypatch):
    _, model = adapted(tiny_llama)
    model.save_as_lora(tmp_path)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    text = (tmp_path / "README.md").read_text()
    assert all(word in text for word in ("variant: plain LoRA", "rank: 6", "mlp.down_proj`", "AutoModelForCausal"))
    (tmp_path / "README.md").write_text(text + "mine\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(LoraConfig, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            model.save_as_lora(tmp_path, rank=8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    model.save_as_lora(tmp_path, rank=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    text = (tmp_path / "README.md").read_text()
    assert "- rank: 8" in text
    assert text.endswith("mine\n")


@pytest.mark.parametrize(("scale", "dtype"), [(0.5, torch.bfloat16), (0.3, torch.float32)])
def test_a_scale_that_16_bits_cannot_hold_widens_the_factor(scale, dtype):
    _, model = adapted(tiny_llama)
    model.bfloat16()
    model.base_model.set_scale("default", scale)
    _, state = model.to_lora()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    B = state["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert B.dtype == dtype
    assert same_bits(B, (layer.bone_block["default"].detach().mT.double() * scale).to(dtype), Promise.SAME_PRODUCT)


def test_a_merged_embedding_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that PEFT saves embeddings along
        _, model = adapted(lambda: tiny_llama(tie_word_embeddings=False), target_modules=["embed_tokens"])
        model.merge_adapter()
        with pytest.raises(ConfigError, match="merged"):
            model.save_as_lora(tmp_path / "out")
    assert listing(tmp_path) == []


def test_an_embedding_becomes_an_embedding_of_lora():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that PEFT saves embeddings along
        bare, model = adapted(lambda: tiny_llama(tie_word_embeddings=False), target_modules=["embed_tokens", "q_proj"])
        config, state = model.to_lora()
        assert close(logits(with_lora(bare, config, state)), logits(model))
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in state


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin = nn.Conv1d(3, 4, 2), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.conv(x).mean(-1))


def test_what_cannot_be_a_lora_is_refused_by_name(tmp_path):
    model = get_peft_model(Convolved(), BoneConfig(r=2, target_modules=["conv", "lin"]))
    with pytest.raises(ConfigError, match=r"no place for conv \(BoneConv\); merge the adapter instead"):
        model.save_as_lora(tmp_path / "out")
    _, model = adapted(tiny_llama, variant="bat-col")
    with pytest.raises(ConfigError, match=r"layers\.0.*bat-col depends on the weight.*give the rank"):
        model.save_as_lora(tmp_path / "out")
    with pytest.raises(ConfigError, match="a rank and an error"):
        model.to_lora(rank=3, error=0.1)
    with pytest.raises(ConfigError, match=r"no adapter 'other' in this model, which has \['default'\]"):
        model.to_lora("other")
    next(bone_layers(model.base_model.model))[1].bone_block["default"].data.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.\S*: the block holds NaN"):
        model.to_lora(rank=3)
    assert listing(tmp_path) == []
    model.unload()
    with pytest.raises(ConfigError, match="no layer of this model has the adapter 'default'; was it unloaded"):
        model.to_lora(rank=3)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("maker", TARGETS)
def test_pefts_own_conversion_takes_every_variant(maker, variant):
    bare, model = adapted(maker, variant=variant)
    assert model.supports_lora_conversion()
    config, state = convert_to_lora(model, rank=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # PEFT forgets it
        got = get_peft_model(copy.deepcopy(bare), config).eval()
    set_peft_model_state_dict(got, state)
    if variant in EXACT:
        assert relative_error(logits(got), logits(model)) < 1e-5
    change, missed = logits(model) - logits(bare), logits(model) - logits(got)
    assert missed.norm() < 0.8 * change.norm()
