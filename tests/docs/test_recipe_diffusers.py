"""docs/recipes/diffusers.md is followed from top to bottom, with a tiny random pipeline under a released one's name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import BoneConfig, LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from flashbone.tuner.layers.layer import BoneLayer
from helpers.comparison import Promise, close, same_bits
from helpers.pages import ROOT, run_page

PAGE = "docs/recipes/diffusers.md"
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SMALL = {'"stable-diffusion-v1-5/stable-diffusion-v1-5", 512': f'"{BASE}", 8', "500, 4, 3e-4": "10, 4, 1e-2"}
SMALL |= {"steps=25": "steps=2"}
# peft about a second adapter on a model, which the page does
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


def write_pipeline(folder: Path) -> None:
    """The parts of Stable Diffusion 1.5, each as small as its class allows."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, cross_attention_dim=12, attention_head_dim=4, **blocks, **sizes
    )
    coder = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(latent_channels=4, sample_size=8, **coder, **sizes)
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    text = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    encoder = CLIPTextModel(CLIPTextConfig(max_position_embeddings=16, **text, **tokens))
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **betas)
    parts = {"vae": vae, "unet": unet, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler}
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder / BASE)


def write_photos(folder: Path) -> None:
    folder.mkdir()
    for number, caption in enumerate(("a red chair", "a blue chair", "a chair")):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{caption}.png")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pipeline(folder)
    write_photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield run_page(PAGE, replaced=SMALL).names


@pytest.mark.slow
def test_training_lowers_the_loss_and_changes_nothing_but_blocks(names):
    model, noising, latents, texts = (names[name] for name in ("model", "noising", "latents", "texts"))
    draw = torch.Generator().manual_seed(1)
    rows, times = torch.arange(12) % 3, torch.randint(1000, (12,), generator=draw)
    noise = torch.randn(latents[rows].shape, generator=draw)
    noisy = noising.add_noise(latents[rows], noise, times)

    def loss() -> float:
        return (model(noisy, times, texts[rows]).sample - noise).square().mean().item()

    with torch.no_grad():
        after = loss()
        with model.disable_adapter():
            assert after < 0.97 * loss()
    trained = [name for name, p in names["model"].named_parameters() if p.requires_grad]
    assert trained
    assert all(".bone_block." in name for name in trained)
    kinds = {type(m.get_base_layer()).__name__ for m in names["model"].modules() if isinstance(m, BoneLayer)}
    assert kinds == {"Linear", "Conv2d"}


@pytest.mark.slow
def test_pictures_are_those_of_the_adapter_at_its_strength_and_merged(names):
    plain, adapted, weaker, merged = (names[name] for name in ("plain", "adapted", "weaker", "merged"))
    effect = np.abs(adapted - plain).mean()
    assert effect > 1e-3
    assert np.abs(merged - adapted).mean() < 1e-3 * effect
    assert np.abs(weaker - plain).mean() > 1e-3
    assert np.abs(weaker - adapted).mean() > 1e-3


@pytest.mark.slow
def test_the_file_gives_the_trained_blocks_back_to_both_ways_of_loading(names):
    trained = {k: p for k, p in names["model"].state_dict().items() if ".bone_block." in k}
    state = names["state"]
    assert len(state) == len(trained)
    for name, block in trained.items():
        key = name.removeprefix("base_model.model.").removesuffix(".default")
        assert same_bits(state[key], block, Promise.STORED)
    layers = [m for m in names["unet"].modules() if isinstance(m, BoneLayer)]
    assert any(layer.bone_scale == {"chairs": 0.8, "other": 0.5} for layer in layers)


@pytest.mark.slow
def test_a_bone_on_attention_becomes_a_lora_of_diffusers_own(names):
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, 8, 8, generator=draw), 1, torch.randn(1, 3, 12, generator=draw)
    with torch.no_grad():
        want, got = names["attention"](*inputs).sample, names["theirs"].unet(*inputs).sample
        with names["attention"].disable_adapter():
            base = names["attention"](*inputs).sample
    assert isinstance(names["theirs"].unet.peft_config["default_0"], LoraConfig)
    assert close(got, want)
    assert (base - want).abs().max() > 1e-3


def test_the_counts_are_those_of_the_unet_of_stable_diffusion_1_5():
    from accelerate import init_empty_weights

    text = (ROOT / PAGE).read_text()
    attention, convolutions = ["to_q", "to_k", "to_v", "to_out.0"], ["conv1", "conv2"]
    counts = []
    for targets in (attention, attention + convolutions):
        with init_empty_weights():
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
            base = sum(p.numel() for p in unet.parameters())
            config = BoneConfig(r=16, target_modules=targets)
            counts.append(get_peft_model(unet, config, low_cpu_mem_usage=True).get_nb_trainable_parameters()[0])
    assert f"{base:,} parameters" in text
    assert f"trains {counts[0]:,} numbers" in text
    assert f"{counts[1]:,} with both" in text
