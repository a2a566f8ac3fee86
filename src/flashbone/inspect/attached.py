"""A skeleton with an adapter on it: which layers were adapted, what is trained, what would be saved."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from flashbone.errors import ConfigError, FlashboneError
from flashbone.inspect.calls import Calls, trace_calls
from flashbone.tuner.layers.conv import BoneConv
from flashbone.tuner.layers.embedding import BoneEmbedding
from flashbone.tuner.layers.layer import BoneLayer
from flashbone.tuner.layers.parameters import ParamWrapper, own_name
from flashbone.tuner.model.config import BoneConfig
from flashbone.tuner.model.keys import VALUE, bare
from flashbone.tuner.model.presets import KIND, parameter_count, published_preset, without_empty_kind
from flashbone.tuner.model.skeleton import skeleton

ADAPTER = "default"
ROOT = "base_model.model."
BLOCK = ".bone_block"


@dataclass(frozen=True)
class Layer:
    """One adapted layer; `calls` is how often a forward pass calls it."""

    name: str
    out_features: int
    in_features: int
    r: int
    block: Tensor
    calls: int


@dataclass(frozen=True)
class Attached:
    """A base and an adapter on it.

    Attributes:
        architecture: class of the base.
        parameters: of the base.
        base_bytes: of those.
        linear_multiply_adds: of the base's linear layers for each token.
        quantised_by: the method that the base's config names.
        labels: of the classification head, by the base's config; None where there is none.
        config: of the adapter.
        layers: the adapted layers, in the model's order.
        calls: of all linear layers.
        others: name in the base -> parameter that is trained besides: a bias, one to save, or part of a module to save.
        copied: names of those that are copies, while the base keeps the frozen original.
        saved_others: key -> tensor of the adapter file that is no block.
    """

    architecture: str
    parameters: int
    base_bytes: int
    linear_multiply_adds: float
    quantised_by: str | None
    labels: int | None
    config: BoneConfig
    layers: tuple[Layer, ...]
    calls: Calls
    others: Mapping[str, Tensor]
    copied: frozenset[str]
    saved_others: Mapping[str, Tensor]


def attach(
    source: PretrainedConfig | str | Path, fields: dict[str, Any], *, recommend: bool, dtype: torch.dtype
) -> Attached:
    """Build a model's skeleton and put an adapter on it; arguments as in `inspect_model`, or the model's config.

    Raises:
        ConfigError: there is no such model, a field is wrong, or no layer matches.
    """
    base: Any = skeleton(source, dtype, fields.get("task_type"))
    linears: dict[str, Any] = {n: m for n, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    calls = trace_calls(base, linears)
    counts = Counter(call.layer for call in calls.calls)
    facts = {
        "architecture": type(base).__name__,
        "parameters": parameter_count(base),
        "base_bytes": sum(p.numel() * p.element_size() for p in base.parameters()),
        "linear_multiply_adds": float(sum(counts[name] * layer.weight.numel() for name, layer in linears.items())),
        "quantised_by": _quantisation(base.config),
        "labels": base.config.num_labels if _classifies(base) else None,
    }
    config = _config(base, fields, recommend)
    model = _adapted(base, config)
    _check_kinds(model)
    layers = [
        Layer(name, m.out_features, m.in_features, m.bone_r[ADAPTER], m.bone_block[ADAPTER], counts[name])
        for name, m in model.base_model.model.named_modules()
        if isinstance(m, BoneLayer)
    ]
    trained = {n.removeprefix(ROOT): p for n, p in model.named_parameters() if p.requires_grad and BLOCK not in n}
    saved = get_peft_model_state_dict(model)
    return Attached(
        **facts,
        config=config,
        layers=tuple(layers),
        calls=calls,
        others={_plain(name): p for name, p in trained.items()},
        copied=frozenset(_plain(n) for n in trained if ".modules_to_save." in f".{n}" or f".{VALUE}." in n),
        saved_others={key: tensor for key, tensor in saved.items() if not key.endswith(BLOCK)},
    )


def _config(base: Any, fields: dict[str, Any], recommend: bool) -> BoneConfig:
    """As `flashbone train` would have it; or the published setting, where no other is asked for."""
    _check_layers(fields)
    fields = {"target_modules": "all-linear", **(without_empty_kind(fields) if recommend else fields)}
    if _classifies(base):
        fields.setdefault("task_type", "SEQ_CLS")  # PEFT then trains the classifier, too
    try:
        if not recommend or any(name in fields for name in KIND):
            return BoneConfig(**fields)
        if published_preset(parameter_count(base)) is None:
            return BoneConfig(**{"r": 64, "variant": "bone", **fields})
        return BoneConfig.recommended(base, **fields)
    except TypeError as error:
        raise ConfigError(f"adapter: {error}") from error


def _check_layers(fields: dict[str, Any]) -> None:
    """Our default of target_modules takes no choice of layers; that is said of what was given."""
    given = [name for name in ("layers_to_transform", "layers_pattern") if fields.get(name) is not None]
    if given and "target_modules" not in fields:
        raise ConfigError(
            f"adapter: {' and '.join(given)} without target_modules, which is then all-linear, in every layer; name the"
            " modules in a list, such as target_modules [q_proj, v_proj]"
        )


def _classifies(base: Any) -> bool:
    return type(base).__name__.endswith("ForSequenceClassification")


def _adapted(base: Any, config: BoneConfig) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on what happens while training or saving
            return get_peft_model(base, config, ADAPTER)  # pyright: ignore[reportArgumentType]
    except FlashboneError:
        raise
    except (ValueError, TypeError, re.error) as error:  # of PEFT, over fields that BoneConfig takes as they come
        raise ConfigError(f"adapter: {' '.join(str(error).split())}") from error


def _check_kinds(model: Any) -> None:
    """Costs are counted for layers that multiply each token with a matrix."""
    others = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, BoneLayer)}
    others = {n: m for n, m in others.items() if isinstance(m, (BoneConv, BoneEmbedding, ParamWrapper))}
    if others:
        names = ", ".join(own_name(n, m, [*others]) for n, m in others.items())
        raise ConfigError(
            f"adapter: {names}: inspect counts what linear layers cost, and no convolutions, embeddings or"
            " target_parameters; leave them out"
        )


def _plain(name: str) -> str:
    """The parameter's name in the bare model."""
    return bare(re.sub(rf"\.modules_to_save\.{ADAPTER}(?=\.)", "", name))


def _quantisation(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown")
