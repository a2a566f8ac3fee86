"""Tiny models of every architecture of the installed transformers: their default configs, shrunk by one rule."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

TOKENS, IMAGE, SAMPLES, MAX_PARAMETERS = 8, 32, 1600, 8_000_000
HEADS, VOCABULARY = 4, 99
# Field by its name -> its tiny value; the first that matches. Smaller values stay.
RULES = [
    (r"(num_)?(key_value|kv).*heads|num_(global_)?key_value_heads|n_head_kv|.*group_query.*", 2),
    (r".*heads?|n_head|.*num_.*heads.*|.*attention_heads.*", HEADS),
    (r"num_hidden_groups|inner_group_num|num_.*(groups|codebook.*)|n_groups?", 1),
    (
        r"(qk_)?(rope|nope)_?(head_)?dim|qk_rope_head_dim|qk_nope_head_dim|.*head_dim|d_kv|.*head_size|attention_head_size",
        8,
    ),
    (r"rotary_dim|rotary_ndims", 4),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r".*layers?|n_layer|depth|num_.*blocks|.*num_layers.*", 2),
    (r".*experts_per_tok(en)?|moe_(top)?k|num_experts_per_.*|top_?k.*", 2),
    (r".*(n_routed|num_local|num_|n_)_?(routed_)?experts|moe_num_experts", 4),
    (r".*vocab_size.*|.*vocabulary.*|char_vocab_size", VOCABULARY),
    (r".*(intermediate|ffn|inner|mlp|feed_forward|feedforward|d_ff)_?(size|dim)?|.*expand_dim", 64),
    (
        r"hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|.*embedding_(size|dim)|.*(hidden|projection|proj|embed|out|conv)_(size|dim)|.*lora_rank|d_embed|.*_dim",
        32,
    ),
    (
        r"max_position.*|n_positions|.*max_.*(positions|length|seq_len).*|n_ctx|sliding_window|block_size|.*chunk_size",
        64,
    ),
    (r"image_size|input_size|img_size", IMAGE),
    (r"patch_size", 8),
    (r"num_frames|.*num_queries|num_labels", 4),
    (r"state_size|ssm_state_size|mamba_d_state|.*rank.*", 8),
]
_KEPT = re.compile(
    r".*(token|feat_extract_layers|_id|_index|_start|_end|every|period|offset|kernel|stride|version|num_channels|eps).*"
)


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config that differ from its defaults once it is tiny."""
    fields, last = {}, VOCABULARY
    for name, value in config.to_dict().items():
        inner = _value(config, name)
        if isinstance(inner, PreTrainedConfig):
            fields[name] = shrunk(inner) | {"model_type": inner.model_type}
        elif type(value) is int and re.fullmatch(r".*_(token_)?(id|index)", name) and value >= VOCABULARY:
            last -= 1
            fields[name] = last
        elif name == "use_cache":
            fields[name] = False
        elif isinstance(value, dict) and "mrope_section" in str(value):
            fields[name] = _with_small_sections(value)
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            fields[name] = _small_list(name, list(value))
        elif type(value) is int and not _KEPT.fullmatch(name):
            small = next((small for pattern, small in RULES if re.fullmatch(pattern, name)), value)
            fields[name] = min(value, small)
        elif name.endswith(("dropout", "drop", "layerdrop", "_prob", "drop_rate", "drop_path_rate", "pdrop")):
            fields[name] = 0.0 if isinstance(value, float) else value
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # latent attention shares nothing
        fields["num_key_value_heads"] = HEADS
    return {name: value for name, value in fields.items() if value != _value(config, name) or isinstance(value, dict)}


def _value(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # of fields that differ by layer; its class is no public one
        return None


def _small_list(name: str, values: list[int]) -> list[int]:
    """Depths of one layer; sizes in their proportions, up to 64."""
    if re.fullmatch(r"depths?|num_blocks|.*(layers|depths|_blocks|num_hidden_layers)|layer_repeats", name):
        return [min(1, v) for v in values]
    if re.fullmatch(r".*heads", name):
        return [2] * len(values)
    if re.fullmatch(r".*(sizes|dims?|channels|features|planes|filters|widths)", name) and max(values) > 64:
        unit = max(values) / 64
        return [v if v < 8 else max(8, round(v / unit / 8) * 8) for v in values]
    return values


def _with_small_sections(rope: dict[str, Any]) -> dict[str, Any]:
    small = {n: _with_small_sections(v) if isinstance(v, dict) else v for n, v in rope.items()}
    return small | ({"mrope_section": [2, 1, 1]} if "mrope_section" in rope else {})


def model_types() -> list[str]:
    return sorted(
        name for name in CONFIG_MAPPING if name in MODEL_MAPPING_NAMES or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )


def tiny_config(model_type: str) -> PreTrainedConfig:
    cls = CONFIG_MAPPING[model_type]
    config = cls()
    fields = shrunk(config)
    layers = next((v for n, v in fields.items() if n in ("num_hidden_layers", "n_layer", "num_layers")), None)
    for name, value in config.to_dict().items():
        if layers and name in ("layer_types", "mlp_layer_types", "layers_block_type") and value:
            kinds = list(dict.fromkeys(value))
            fields[name] = (kinds * layers)[-layers:] if len(kinds) <= layers else kinds
            fields |= {n: len(fields[name]) for n in ("num_hidden_layers", "n_layer") if n in fields}
    tiny = cls(**fields)
    tiny._attn_implementation = "eager"
    for field in ("use_cache", "return_dict"):
        if hasattr(tiny, field):
            setattr(tiny, field, field == "return_dict")
    return tiny


def tiny_model(model_type: str) -> nn.Module:
    config = tiny_config(model_type)
    auto: Any = AutoModel
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        auto = AutoModelForCausalLM
    elif model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        auto = AutoModelForMaskedLM
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size} parameters")
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)  # gates that start at zero let nothing through
    return model


def _field(config: Any, *names: str, default: int) -> int:
    for name in names:
        for holder in (config, *(getattr(config, n, None) for n in ("vision_config", "audio_config", "text_config"))):
            value = getattr(holder, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
    return default


def _patches(model: Any, wanted: Any) -> dict[str, Tensor]:
    """Two images of 4 x 4 patches, flattened, for vision towers that take their sizes beside them."""
    config = model.config
    channels = _field(config, "in_channels", "in_chans", "num_channels", default=3)
    size = channels * _field(config, "temporal_patch_size", default=1) * _field(config, "patch_size", default=8) ** 2
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    first = next(iter(wanted))
    values: dict[str, Tensor] = {first: torch.randn(32, size)}
    values |= {name: grid for name in ("grid_thw", "image_grid_thw") if name in wanted}
    return values | ({"merge_sizes": torch.tensor([2, 2])} if "merge_sizes" in wanted else {})


def inputs_of(model: Any) -> dict[str, Tensor]:
    """What the model's forward wants at least."""
    config, wanted = model.config, inspect.signature(model.forward).parameters
    image, channels = _field(config, "image_size", default=IMAGE), _field(config, "num_channels", default=3)
    ids = torch.randint(4, max(6, min(40, _field(config, "vocab_size", default=40))), (2, TOKENS))
    mels = _field(config, "num_mel_bins", "feature_size", "input_dim", default=80)
    main = model.main_input_name
    inputs: dict[str, Tensor] = {}
    grids = {"grid_thw", "image_grid_thw"} & set(wanted)
    if (main == "pixel_values" and not grids) or ("pixel_values" in wanted and "input_ids" not in wanted and not grids):
        inputs["pixel_values"] = torch.randn(2, channels, image, image)
    elif main == "pixel_values_videos":
        inputs[main] = torch.randn(
            1, _field(config, "num_frames", "frames_per_clip", default=4), channels, image, image
        )
    elif main == "input_values" and "input_values" in wanted:
        inputs[main] = torch.randn(2, SAMPLES)
    elif main == "input_features" and "input_features" in wanted:
        frames = 2 * _field(config, "max_source_positions", default=16)
        inputs[main] = (
            torch.randn(2, mels, frames) if "max_source_positions" in config.to_dict() else torch.randn(2, 32, mels)
        )
    elif "input_ids" not in wanted and grids:
        inputs |= _patches(model, wanted)
    else:
        inputs["input_ids"] = ids
        if "pixel_values" in wanted and wanted["pixel_values"].default is inspect.Parameter.empty:
            inputs["pixel_values"] = torch.randn(2, channels, image, image)
    if "decoder_input_ids" in wanted:
        inputs["decoder_input_ids"] = ids[:, :5]
    towers = hasattr(config, "text_config") and hasattr(config, "vision_config")
    if towers and {"pixel_values", "input_ids"} <= set(wanted) and "image_token" not in str(list(config.to_dict())):
        inputs |= {"input_ids": ids, "pixel_values": torch.randn(2, channels, image, image)}
    return inputs
