"""What adapting a model would cost: parameters, file, memory, arithmetic, beside LoRA; from its config alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from flashbone.errors import ConfigError, FormatError
from flashbone.files import reading
from flashbone.files.tensors import file_size
from flashbone.inspect.attached import ROOT, Attached, Layer, attach
from flashbone.inspect.costs import Setting
from flashbone.inspect.methods import Method, attached_method, lora_twin
from flashbone.inspect.reports import Costs, LayerGroup, ModelReport, Recommendation, TrainedGroup
from flashbone.inspect.writing import group_names
from flashbone.tuner.model.config import BoneConfig
from flashbone.tuner.model.presets import published_preset

STATES = 3  # of each trained number: its gradient and AdamW's two moments
METADATA = {"format": "pt"}  # that PEFT writes into its files


def inspect_model(
    source: str | Path,
    fields: dict[str, Any] | None = None,
    *,
    recommend: bool = True,
    tokens: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
) -> ModelReport:
    """What training an adapter on a model would cost. No weights are read, and none are made.

    Args:
        source: A folder, a config.json, a hub id, or the `.pth` file of an RWKV-7 or RWKV-6 model.
        fields: Of BoneConfig; all linear layers unless they say otherwise. `task_type` decides the head of the model.
        recommend: Where the fields do not say which variant or block size, take the published setting for the model's
            size, and `bone` with r = 64 above 13B; else BoneConfig's defaults.
        tokens: Batch times sequence of one training step.
        dtype: Of the base while training, under autocast where it is half precision; the adapter is in fp32.

    Raises:
        ConfigError: there is no such model, a field is wrong, or no layer matches; or there are no tokens.
        FormatError: the `.pth` file is broken, or no such model.
    """
    if tokens < 1:
        raise ConfigError(f"tokens: got {tokens}, wanted at least 1")
    found = attach(_described(source), fields or {}, recommend=recommend, dtype=dtype)
    config = found.config
    setting = Setting(tokens, dtype.itemsize, dtype.itemsize < 4, config.dropout > 0, config.use_orthogonal)
    return _report(str(source), found, setting, str(dtype).removeprefix("torch."))


def _described(source: str | Path) -> PretrainedConfig | str | Path:
    """What says how the model is built: of a `.pth` file, the config that its names and shapes mean."""
    path = Path(source).expanduser()
    if path.suffix != ".pth" or not path.is_file():
        return source
    from flashbone.rwkv import read_config

    if reading.rwkv_kind(path) == "adapter":
        raise FormatError(f"{path}: is an adapter of RWKV-PEFT, wanted a model; inspect_adapter describes it")
    return read_config(path)


def _report(source: str, found: Attached, setting: Setting, dtype: str) -> ModelReport:
    published = _published(found.parameters)
    return ModelReport(
        model=source,
        architecture=found.architecture,
        parameters=found.parameters,
        base_bytes=found.base_bytes,
        dtype=dtype,
        quantised_by=found.quantised_by,
        labels=found.labels,
        tokens=setting.tokens,
        linear_multiply_adds=found.linear_multiply_adds,
        config=_telling_fields(found),
        is_recommended=_is_published(found.config, published),
        recommended=published,
        layers=tuple(_layer_groups(found, attached_method(found), setting)),
        others=tuple(_trained_groups(found)),
        costs=_costs(found, attached_method(found), setting),
        lora=_costs(found, lora_twin(found), setting),
        assumption=found.calls.assumption,
    )


def _published(parameters: int) -> Recommendation | None:
    preset = published_preset(parameters)
    return Recommendation(preset.r, preset.dropout, preset.orthogonal_eps) if preset else None


def _is_published(config: BoneConfig, published: Recommendation | None) -> bool:
    """Whether the adapter has the published setting, in all of its layers."""
    taken = Recommendation(config.r, config.dropout, config.orthogonal_eps)
    is_its_kind = config.variant == "orthogonal" and config.use_orthogonal and not config.rank_pattern
    return is_its_kind and taken == published


def _trained_groups(found: Attached) -> list[TrainedGroup]:
    groups = []
    for group in group_names((name, (tuple(p.shape), name in found.copied)) for name, p in found.others.items()):
        first, parameters = group.names[0], sum(found.others[name].numel() for name in group.names)
        weights = 1 if first in found.copied else 0  # a bias is the base's own
        groups.append(
            TrainedGroup(
                names=group.pattern,
                count=len(group.names),
                shape=tuple(found.others[first].shape),
                trainable_parameters=parameters,
                percent_of_base=100 * parameters / found.parameters,
                training_bytes=(weights + STATES) * parameters * found.others[first].element_size(),
            )
        )
    return groups


def _costs(found: Attached, method: Method, setting: Setting) -> Costs:
    parameters = sum(map(method.parameters, found.layers))
    others = sum(p.numel() for p in found.others.values())
    block_bytes = sum(method.parameters(layer) * layer.block.element_size() for layer in found.layers)
    copies = sum(found.others[name].nbytes for name in found.copied)
    states = STATES * (block_bytes + sum(p.nbytes for p in found.others.values()))
    activations = sum(_activations(found, method, setting).values())
    arithmetic = sum(method.multiply_adds(layer, setting) for layer in found.layers)
    return Costs(
        method=method.name,
        r=method.r,
        trainable_parameters=parameters + others,
        percent_of_base=100 * (parameters + others) / found.parameters,
        file_bytes=_file_bytes(found, method),
        weight_bytes=block_bytes + copies,
        state_bytes=states,
        activation_bytes=activations,
        training_bytes=found.base_bytes + block_bytes + copies + states + activations,
        multiply_adds=arithmetic,
        percent_of_linears=100 * arithmetic / found.linear_multiply_adds,
    )


def _file_bytes(found: Attached, method: Method) -> int:
    layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in found.saved_others.items()}
    for layer in found.layers:
        for suffix, shape in method.shapes(layer).items():
            layout[ROOT + layer.name + suffix] = (layer.block.dtype, shape)
    return file_size(layout, METADATA)


def _activations(found: Attached, method: Method, setting: Setting) -> dict[str, int]:
    """Layer -> bytes kept by its calls; an input that several layers see is counted with the first."""
    layers = {layer.name: layer for layer in found.layers}
    total: dict[str, int] = defaultdict(int)
    inputs: set[int] = set()
    for call in found.calls.calls:
        if call.layer in layers:
            kept = method.kept(layers[call.layer], setting)
            total[call.layer] += kept.own + (0 if call.input in inputs else kept.input)
            inputs.add(call.input)
    return total


def _layer_groups(found: Attached, method: Method, setting: Setting) -> list[LayerGroup]:
    layers = {layer.name: layer for layer in found.layers}
    kept = _activations(found, method, setting)

    def key(layer: Layer) -> tuple[Any, ...]:
        return layer.out_features, layer.in_features, layer.r, tuple(layer.block.shape), layer.calls, kept[layer.name]

    groups = []
    for group in group_names((layer.name, key(layer)) for layer in found.layers):
        first, n = layers[group.names[0]], len(group.names)
        parameters = n * method.parameters(first)
        arithmetic = n * method.multiply_adds(first, setting)
        activations = n * kept[first.name]
        groups.append(
            LayerGroup(
                modules=group.pattern,
                layers=n,
                out_features=first.out_features,
                in_features=first.in_features,
                r=first.r,
                block_shape=tuple(first.block.shape),
                trainable_parameters=parameters,
                percent_of_base=100 * parameters / found.parameters,
                activation_bytes=activations,
                training_bytes=(1 + STATES) * parameters * first.block.element_size() + activations,
                multiply_adds=arithmetic,
                percent_of_linears=100 * arithmetic / found.linear_multiply_adds,
            )
        )
    return groups


_TELLING = (
    *("variant", "r", "mini_r", "dropout", "use_orthogonal", "orthogonal_eps", "target_modules", "exclude_modules"),
    *("layers_to_transform", "rank_pattern", "bias", "modules_to_save"),
)


def _telling_fields(found: Attached) -> dict[str, Any]:
    """Fields that decide what the adapter costs; those at their defaults are left out."""
    config = found.config
    defaults = {item.name: item.default for item in fields_of(config)}
    telling = {name: getattr(config, name) for name in _TELLING if name in defaults}
    kept = {
        name: v for name, v in telling.items() if name in ("variant", "r", "dropout") or v not in (defaults[name], {})
    }
    return {name: sorted(value) if isinstance(value, set) else value for name, value in kept.items()}
