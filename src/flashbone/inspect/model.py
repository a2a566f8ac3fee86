"""What adapting a model would cost: parameters, file, memory, arithmetic, beside LoRA; from its config alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import PretrainedConfig

from flashbone.errors import ConfigError, FormatError
from flashbone.files import reading
from flashbone.files.tensors import file_size
from flashbone.inspect.attached import ADAPTER, BLOCK, ROOT, AttachedModel, attach
from flashbone.inspect.measuring import LayerCost, measure
from flashbone.inspect.reports import Costs, LayerGroup, ModelReport, Recommendation, TrainedGroup
from flashbone.inspect.writing import group_names
from flashbone.tuner.model.config import BoneConfig
from flashbone.tuner.model.presets import PRESET_VARIANT, published_preset

STATES = 3  # of each trained number: its gradient and AdamW's two moments
METADATA = {"format": "pt"}  # that PEFT writes into its files


def inspect_model(
    source: PretrainedConfig | str | Path,
    fields: dict[str, Any] | None = None,
    *,
    tokens: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
) -> ModelReport:
    """What training an adapter on a model would cost. No weights are read, and none are made.

    Args:
        source: A config, a folder, a config.json, a hub id, or the `.pth` file of an RWKV-7 or RWKV-6 model.
        fields: Of BoneConfig, whose defaults are `bone` with r = 64; all linear layers unless they name others.
            `task_type` decides the head of the model.
        tokens: Batch times sequence of one training step.
        dtype: Of the base while training, under autocast where it is half precision; the adapter is in fp32.

    Raises:
        ConfigError: the model does not exist, a field is wrong, no layer matches, or tokens is not positive.
        FormatError: the `.pth` file is broken, or not an RWKV model.
    """
    if tokens < 1:
        raise ConfigError(f"tokens: got {tokens}, wanted at least 1")
    model = attach(_config_source(source), fields or {}, dtype=dtype)
    config = model.config
    preset = published_preset(model.base.parameters)
    published = Recommendation(preset.r, preset.dropout, preset.orthogonal_eps) if preset else None
    is_rotation = config.variant == PRESET_VARIANT and config.use_orthogonal and not config.rank_pattern
    layers = _bone_layers(model, tokens, dtype)
    return ModelReport(
        **vars(model.base),
        model=str(source.name_or_path if isinstance(source, PretrainedConfig) else source),
        dtype=str(dtype).removeprefix("torch."),
        tokens=tokens,
        config=_deciding_fields(config),
        is_recommended=is_rotation and Recommendation(config.r, config.dropout, config.orthogonal_eps) == published,
        recommended=published,
        layers=tuple(_layer_groups(model, layers)),
        others=tuple(_trained_groups(model)),
        costs=_costs(model, config.variant, config.r, layers),
        lora=_costs(model, "lora", *_lora_layers(model, tokens, dtype)),
    )


def _config_source(source: PretrainedConfig | str | Path) -> PretrainedConfig | str | Path:
    """What the model is built from: for a `.pth` file, the config that follows from its names and shapes."""
    if isinstance(source, PretrainedConfig):
        return source
    path = Path(source).expanduser()
    if path.suffix != ".pth" or not path.is_file():
        return source
    from flashbone.rwkv import read_config

    if reading.rwkv_kind(path) == "adapter":
        raise FormatError(f"{path}: is an adapter of RWKV-PEFT, wanted a model; inspect_adapter describes it")
    return read_config(path)


_DECIDING = (
    *("variant", "r", "mini_r", "dropout", "use_orthogonal", "orthogonal_eps", "target_modules", "exclude_modules"),
    *("layers_to_transform", "rank_pattern", "bias", "modules_to_save"),
)


def _deciding_fields(config: BoneConfig) -> dict[str, Any]:
    """Fields that decide what the adapter costs; those at their defaults are left out."""
    defaults = {item.name: item.default for item in fields_of(config)}
    values = {name: getattr(config, name) for name in _DECIDING}
    shown = {n: v for n, v in values.items() if n in ("variant", "r", "dropout") or v not in (defaults[n], {})}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in shown.items()}


def _bone_layers(model: AttachedModel, tokens: int, dtype: torch.dtype) -> dict[str, LayerCost]:
    """The adapted layers; of several alike, one is measured."""
    measured: dict[Hashable, LayerCost] = {}
    layers = {}
    for name, layer in model.layers.items():
        block = layer.bone_block[ADAPTER]
        kind = type(layer), type(layer.get_base_layer()), layer.out_features, layer.in_features, block.shape
        if kind not in measured:
            measured[kind] = measure(layer, {BLOCK: block}, tokens, dtype)
        layers[name] = measured[kind]
    return layers


def _lora_layers(model: AttachedModel, tokens: int, dtype: torch.dtype) -> tuple[int, dict[str, LayerCost]]:
    """A LoRA of one rank on the same layers, with the rank that comes nearest in trained numbers; and that rank."""
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in model.layers.items()}
    trained = sum(layer.bone_block[ADAPTER].numel() for layer in model.layers.values())
    rank = max(1, round(trained / sum(map(sum, sizes.values()))))
    config = LoraConfig(r=rank, lora_dropout=model.config.dropout, target_modules=["0"])
    measured = {}
    for in_features, out_features in set(sizes.values()):
        with torch.device("meta"):
            alone: Any = get_peft_model(nn.Sequential(nn.Linear(in_features, out_features, dtype=dtype)), config)
        tensors = {key.removeprefix(f"{ROOT}0"): t for key, t in get_peft_model_state_dict(alone).items()}
        measured[in_features, out_features] = measure(alone.get_base_model()[0], tensors, tokens, dtype)
    return rank, {name: measured[size] for name, size in sizes.items()}


def _costs(model: AttachedModel, method: str, r: int, layers: dict[str, LayerCost]) -> Costs:
    parameters = sum(layer.parameters for layer in layers.values()) + sum(p.numel() for p in model.others.values())
    layer_bytes = sum(layer.bytes for layer in layers.values())
    weights = layer_bytes + sum(model.others[name].nbytes for name in model.copied)
    states = STATES * (layer_bytes + sum(p.nbytes for p in model.others.values()))
    kept, arithmetic = _of_calls(model, layers)
    activations, multiply_adds = sum(kept.values()), sum(arithmetic.values())
    saved = model.saved_others | {
        f"{ROOT}{name}{ending}": tensor for name, layer in layers.items() for ending, tensor in layer.tensors.items()
    }
    return Costs(
        method=method,
        r=r,
        trainable_parameters=parameters,
        percent_of_base=100 * parameters / model.base.parameters,
        file_bytes=file_size({key: (t.dtype, tuple(t.shape)) for key, t in saved.items()}, METADATA),
        weight_bytes=weights,
        state_bytes=states,
        activation_bytes=activations,
        training_bytes=model.base.base_bytes + weights + states + activations,
        multiply_adds=multiply_adds,
        percent_of_linears=100 * multiply_adds / model.base.linear_multiply_adds,
    )


def _of_calls(model: AttachedModel, layers: dict[str, LayerCost]) -> tuple[dict[str, int], dict[str, float]]:
    """Layer -> bytes kept by its calls, and their multiply-adds. An input that several layers see is counted with the
    first."""
    kept: dict[str, int] = defaultdict(int)
    multiply_adds: dict[str, float] = defaultdict(float)
    inputs: set[int] = set()
    for name, x in model.calls:
        if name in layers:
            kept[name] += layers[name].kept_bytes + (0 if x in inputs else layers[name].kept_input_bytes)
            multiply_adds[name] += layers[name].multiply_adds
            inputs.add(x)
    return kept, multiply_adds


def _layer_groups(model: AttachedModel, layers: dict[str, LayerCost]) -> list[LayerGroup]:
    kept, multiply_adds = _of_calls(model, layers)

    def key(name: str) -> Hashable:
        layer, block = model.layers[name], layers[name].tensors[BLOCK]
        return layer.out_features, layer.in_features, tuple(block.shape), multiply_adds[name], kept[name]

    groups = []
    for group in group_names((name, key(name)) for name in layers):
        name, n = group.names[0], len(group.names)
        layer, cost = model.layers[name], layers[name]
        groups.append(
            LayerGroup(
                modules=group.pattern,
                layers=n,
                out_features=layer.out_features,
                in_features=layer.in_features,
                r=layer.bone_r[ADAPTER],
                block_shape=tuple(cost.tensors[BLOCK].shape),
                trainable_parameters=n * cost.parameters,
                percent_of_base=100 * n * cost.parameters / model.base.parameters,
                activation_bytes=n * kept[name],
                training_bytes=n * ((1 + STATES) * cost.bytes + kept[name]),
                multiply_adds=n * multiply_adds[name],
                percent_of_linears=100 * n * multiply_adds[name] / model.base.linear_multiply_adds,
            )
        )
    return groups


def _trained_groups(model: AttachedModel) -> list[TrainedGroup]:
    groups = []
    for group in group_names((name, (tuple(p.shape), name in model.copied)) for name, p in model.others.items()):
        first, n = model.others[group.names[0]], len(group.names)
        copies = group.names[0] in model.copied  # the base keeps its original besides
        groups.append(
            TrainedGroup(
                names=group.pattern,
                count=n,
                shape=tuple(first.shape),
                trainable_parameters=n * first.numel(),
                percent_of_base=100 * n * first.numel() / model.base.parameters,
                training_bytes=(copies + STATES) * n * first.nbytes,
            )
        )
    return groups
