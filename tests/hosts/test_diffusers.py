"""diffusers' models: adapters in a tiny UNet and a tiny CLIP text model, their scales, and what is LoRA's alone."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from peft import BoneConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from flashbone.errors import ConfigError, FlashboneError
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import fill_blocks
from helpers.transformers_peft import needs_transformers_own_adapters

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]

# peft about a second adapter on a model; it is what these tests do
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CLIPTextModel(CLIPTextConfig(vocab_size=30, max_position_embeddings=8, **sizes, **tokens)).eval()


def config(variant: str = "bone", **fields) -> BoneConfig:
    return BoneConfig(**{"r": 3, "variant": variant, "mini_r": 2, "target_modules": ATTENTION} | fields)


def noise(model, text: torch.Tensor | None = None) -> torch.Tensor:
    """The model's output on a fixed image and text."""
    draw = torch.Generator().manual_seed(1)
    image, words = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 3, 12, generator=draw)
    return model(image, 1, words if text is None else text).sample


def train(models, output, steps: int = 2) -> set[str]:
    """Names of the parameters that a few steps change."""
    named = {f"{i}.{name}": p for i, model in enumerate(models) for name, p in model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = torch.optim.SGD([p for p in named.values() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (output() - 1).square().mean().backward()
        optimizer.step()
    return {name for name, parameter in named.items() if not torch.equal(parameter, before[name])}


@needs_transformers_own_adapters
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_unet_and_a_text_encoder_are_trained_together_saved_and_loaded(variant, tmp_path):
    model, encoder = unet(), text_encoder()
    words = torch.tensor([[1, 7, 2]])
    plain = noise(model, encoder(words).last_hidden_state)
    model.add_adapter(config(variant), "style")
    encoder.add_adapter(config(variant, target_modules=["q_proj", "fc1"]), "style")
    assert close(noise(model, encoder(words).last_hidden_state), plain)  # bat-col multiplies with a weight of its own
    changed = train([model, encoder], lambda: noise(model, encoder(words).last_hidden_state))
    assert len(changed) == 32 + 4
    assert all(name.endswith("bone_block.style") for name in changed)
    with torch.no_grad():
        want = noise(model, encoder(words).last_hidden_state)
    assert not torch.equal(want, plain)

    torch.save(get_peft_model_state_dict(model, adapter_name="style"), tmp_path / "unet.pt")
    encoder.save_pretrained(tmp_path / "encoder")
    again = unet()
    again.add_adapter(config(variant), "again")
    set_peft_model_state_dict(again, torch.load(tmp_path / "unet.pt", weights_only=True), "again")
    encoder = text_encoder()
    encoder.load_adapter(str(tmp_path / "encoder"))
    with torch.no_grad():
        assert close(noise(again, encoder(words).last_hidden_state), want)  # loaded blocks lie in memory as in the file


def test_peft_s_own_wrapper_trains_saves_and_loads_a_unet_as_a_folder(tmp_path):
    model = get_peft_model(unet(), config("bat-row"))
    assert all("bone_block" in name for name in train([model], lambda: noise(model)))
    model.save_pretrained(tmp_path)
    want = noise(model)
    loaded = PeftModel.from_pretrained(unet(), tmp_path)
    assert same_bits(noise(loaded), want, Promise.SAME_PRODUCT)
    assert close(noise(loaded.merge_and_unload()), want)


def test_set_adapters_weighs_adapters_of_different_variants():
    model = unet()
    plain = noise(model)
    for name, variant in {"a": "bat-col", "b": "bat-row"}.items():
        model.add_adapter(config(variant, init_weights=False), name)
    model.set_adapters(["a", "b"], [0.5, 0.25])
    assert model.active_adapters() == ["a", "b"]
    layers = [module for module in model.modules() if hasattr(module, "bone_scale")]
    assert len(layers) == 32
    assert all(layer.bone_scale == {"a": 0.5, "b": 0.25} for layer in layers)
    both = noise(model)
    halved = layers[0]
    x = torch.randn(5, halved.in_features)
    base = halved.base_layer(x)
    parts = torch.zeros_like(base)
    for name, weight in {"a": 0.5, "b": 0.25}.items():
        model.set_adapters(name, 1.0)
        parts += weight * (halved(x) - base)
    model.set_adapters(["a", "b"], [0.5, 0.25])
    assert close(halved(x), base + parts)
    assert same_bits(noise(model), both, Promise.SAME_PRODUCT)
    model.disable_lora()
    assert same_bits(noise(model), plain, Promise.SAME_PRODUCT)
    model.enable_lora()
    model.fuse_lora()
    assert close(noise(model), both)
    model.unfuse_lora()
    assert same_bits(noise(model), both, Promise.SAME_PRODUCT)
    model.delete_adapters("b")
    model.set_adapters("a", 0.0)
    assert close(noise(model), plain)


def test_an_adapter_that_cannot_be_added_leaves_no_trace():
    model = unet()
    want = noise(model)
    with pytest.raises(ConfigError, match=r"Target modules \{'typo'\} not found"):
        model.add_adapter(config(target_modules=["typo"]))
    assert not model._hf_peft_config_loaded
    assert same_bits(noise(model), want, Promise.SAME_PRODUCT)
    with pytest.raises(ConfigError, match=r"time_proj: target module cannot be adapted"):
        model.add_adapter(config(target_modules=["to_q", "time_proj"]))
    assert not any("bone" in name for name, _ in model.named_modules())


def test_files_in_diffusers_own_format_are_lora_s_alone(tmp_path):
    model = unet()
    model.add_adapter(config(init_weights=False))
    with pytest.raises(ConfigError, match=r"save_lora_adapter: .*'default' is a BONE adapter.* peft.get_peft_model"):
        model.save_lora_adapter(tmp_path)
    assert not list(Path(tmp_path).iterdir())
    with pytest.raises(IndexError) as raised:  # diffusers looks for ranks of LoRA
        unet().load_lora_adapter(get_peft_model_state_dict(model), prefix=None)
    assert not isinstance(raised.value, FlashboneError)
    other = unet()
    other.add_adapter(LoraConfig(target_modules=ATTENTION, init_lora_weights=False))
    other.save_lora_adapter(tmp_path)
    again = unet()
    again.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert close(noise(again), noise(other))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


WORDS, STEP = drawn(1, 3, 12), torch.tensor([1])
HEADS = {"num_attention_heads": 2, "num_layers": 1}
IMAGES = {"in_channels": 4, "sample_size": 8, "patch_size": 2}
TEXT = {"joint_attention_dim": 12, "pooled_projection_dim": 10}
BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
ARCHITECTURES = {
    "unet": (unet, lambda m: m(drawn(1, 4, 8, 8), 1, WORDS)),
    "vae": (
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **BLOCKS
        ),
        lambda m: m(drawn(1, 3, 8, 8)),
    ),
    "dit": (
        lambda: DiTTransformer2DModel(
            attention_head_dim=4, out_channels=8, num_embeds_ada_norm=10, norm_num_groups=4, **HEADS, **IMAGES
        ),
        lambda m: m(drawn(1, 4, 8, 8), timestep=STEP, class_labels=torch.tensor([3])),
    ),
    "sd3": (
        lambda: SD3Transformer2DModel(
            attention_head_dim=8,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=8,
            **HEADS,
            **IMAGES,
            **TEXT,
        ),
        lambda m: m(drawn(1, 4, 8, 8), WORDS, drawn(1, 10), STEP),
    ),
    "flux": (
        lambda: FluxTransformer2DModel(
            in_channels=4, num_single_layers=1, attention_head_dim=16, axes_dims_rope=(4, 4, 8), **HEADS, **TEXT
        ),
        lambda m: m(
            drawn(1, 16, 4), WORDS, drawn(1, 10), STEP.double(), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(3, 3)
        ),
    ),
    "wan": (
        lambda: WanTransformer3DModel(
            attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16, ffn_dim=20, **HEADS
        ),
        lambda m: m(drawn(1, 4, 2, 8, 8), STEP, WORDS),
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_and_convolution_acts_as_it_does_merged_and_learns(name):
    build, call = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = build().double().eval()
    targets = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]
    adapted = get_peft_model(model, config(target_modules=targets))
    fill_blocks(adapted)
    live = call(model).sample
    live.square().mean().backward()
    idle = [
        name for name, p in adapted.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())
    ]
    # What the queries of the last block's words compute is dropped.
    assert idle == (
        ["base_model.model.transformer_blocks.0.attn.add_q_proj.bone_block.default"] if name == "sd3" else []
    )
    adapted.merge_adapter()
    with torch.no_grad():
        assert close(call(model).sample, live.detach())
        adapted.unmerge_adapter()
        with adapted.disable_adapter():
            assert not close(call(model).sample, live.detach())
