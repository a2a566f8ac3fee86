"""A tiny random model of each architecture that `files/gguf.py` knows."""

import torch
import transformers as hf
from torch import nn

VOCABULARY = 64
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN = TOKENS | SHAPE | HEADS
WIDE = PLAIN | {"head_dim": 16}  # the heads together are wider than the model
GEMMA3 = WIDE | {"query_pre_attn_scalar": 16}
VISION = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
}
GPT2 = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64}

# architecture -> (configuration, its fields)
MODELS: dict[str, tuple[type, dict]] = {
    "LlamaForCausalLM": (hf.LlamaConfig, PLAIN),
    "MistralForCausalLM": (hf.MistralConfig, WIDE),
    "GraniteForCausalLM": (hf.GraniteConfig, PLAIN),
    "SmolLM3ForCausalLM": (hf.SmolLM3Config, PLAIN),
    "OlmoForCausalLM": (hf.OlmoConfig, PLAIN),
    "ArceeForCausalLM": (hf.ArceeConfig, PLAIN),
    "Olmo2ForCausalLM": (hf.Olmo2Config, PLAIN),
    "Olmo3ForCausalLM": (hf.Olmo3Config, PLAIN | {"sliding_window": 16}),
    "Qwen2ForCausalLM": (hf.Qwen2Config, PLAIN),
    "Qwen3ForCausalLM": (hf.Qwen3Config, WIDE),
    "GemmaForCausalLM": (hf.GemmaConfig, WIDE),
    "Gemma2ForCausalLM": (hf.Gemma2Config, WIDE | {"query_pre_attn_scalar": 16}),
    "Gemma3ForCausalLM": (hf.Gemma3TextConfig, WIDE | {"query_pre_attn_scalar": 16}),
    "PhiForCausalLM": (hf.PhiConfig, PLAIN | {"num_key_value_heads": 4, "intermediate_size": 128}),
    "Phi3ForCausalLM": (hf.Phi3Config, PLAIN),
    "StableLmForCausalLM": (hf.StableLmConfig, PLAIN),
    "Starcoder2ForCausalLM": (hf.Starcoder2Config, PLAIN),
    "CohereForCausalLM": (hf.CohereConfig, PLAIN),
    "Cohere2ForCausalLM": (hf.Cohere2Config, PLAIN | {"rotary_pct": 1.0}),
    "SeedOssForCausalLM": (hf.SeedOssConfig, WIDE),
    "Exaone4ForCausalLM": (hf.Exaone4Config, PLAIN),
    "Glm4ForCausalLM": (hf.Glm4Config, PLAIN | {"head_dim": 8}),
    "NemotronForCausalLM": (hf.NemotronConfig, PLAIN),
    "ApertusForCausalLM": (hf.ApertusConfig, PLAIN),
    "GPT2LMHeadModel": (hf.GPT2Config, GPT2),
    "Gemma3ForConditionalGeneration": (hf.Gemma3Config, {"text_config": GEMMA3, "vision_config": VISION} | TOKENS),
    "Ernie4_5ForCausalLM": (hf.Ernie4_5Config, PLAIN | {"head_dim": 8}),
    "HunYuanDenseV1ForCausalLM": (hf.HunYuanDenseV1Config, PLAIN | {"head_dim": 8}),
}


def tiny(architecture: str) -> nn.Module:
    """The model in fp32, with weights large enough that a change of any layer shows in the logits."""
    torch.manual_seed(0)
    config, fields = MODELS[architecture]
    model = getattr(hf, architecture)(config(**fields)).float().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter.data, std=0.15)
    return model


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of every linear layer of the language model, the head only where it is not tied."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    layers = {}
    for name, module in model.named_modules():
        is_linear = type(module).__name__ in ("Linear", "Conv1D")
        if is_linear and "vision_tower" not in name and not (name == "lm_head" and tied):
            out, in_ = module.weight.shape
            layers[name] = (in_, out) if type(module).__name__ == "Conv1D" else (out, in_)
    return layers
