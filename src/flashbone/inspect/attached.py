"""A model without weights and an adapter on it: which layers are adapted, what is trained, what would be saved."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from flashbone.errors import ConfigError, FlashboneError
from flashbone.inspect.measuring import LayerCall, trace_calls
from flashbone.inspect.reports import BaseFacts
from flashbone.tuner.layers.conv import BoneConv
from flashbone.tuner.layers.embedding import BoneEmbedding
from flashbone.tuner.layers.layer import BoneLayer
from flashbone.tuner.layers.parameters import ParamWrapper, own_name
from flashbone.tuner.model.config import BoneConfig
from flashbone.tuner.model.keys import bare
from flashbone.tuner.model.presets import parameter_count, without_empty_kind
from flashbone.tuner.model.skeleton import skeleton

ADAPTER = "default"
ROOT = "base_model.model."
BLOCK = ".bone_block"


@dataclass(frozen=True)
class AttachedModel:
    """A base and an adapter on it.

    Attributes:
        base: without the adapter.
        calls: of the base's linear layers in a forward pass.
        config: of the adapter.
        layers: name in the base -> adapted layer, in the model's order.
        others: name in the base -> parameter that is trained besides: a bias, or one of a module to save.
        copied: names of `others` that are copies, while the base keeps the frozen original.
        saved_others: key -> tensor of the adapter file that is not a block.
    """

    base: BaseFacts
    calls: list[LayerCall]
    config: BoneConfig
    layers: dict[str, BoneLayer]
    others: dict[str, nn.Parameter]
    copied: frozenset[str]
    saved_others: dict[str, Tensor]


def attach(source: PretrainedConfig | str | Path, fields: dict[str, Any], *, dtype: torch.dtype) -> AttachedModel:
    """Build a model without weights and put an adapter on it; arguments as in `inspect_model`, or the model's config.

    Raises:
        ConfigError: the model does not exist, a field is wrong, or no layer matches.
    """
    base: Any = skeleton(source, dtype, fields.get("task_type"))
    originals = {id(p): p for p in base.parameters()}
    linears: dict[str, Any] = {n: m for n, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    calls, assumption = trace_calls(base, linears)
    facts = BaseFacts(
        architecture=type(base).__name__,
        parameters=parameter_count(base),
        base_bytes=sum(p.nbytes for p in originals.values()),
        linear_multiply_adds=float(sum(linears[name].weight.numel() for name, _ in calls)),
        quantised_by=_quantisation(base.config),
        labels=base.config.num_labels if _has_classifier(base) else None,
        assumption=assumption,
    )
    config = _config(base, fields)
    model = _adapted(base, config)
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, BoneLayer)}
    _check_kinds(layers)
    trained = {_plain(n): p for n, p in model.named_parameters() if p.requires_grad and BLOCK not in n}
    return AttachedModel(
        base=facts,
        calls=calls,
        config=config,
        layers=layers,
        others=trained,
        copied=frozenset(name for name, p in trained.items() if id(p) not in originals),
        saved_others={key: t for key, t in get_peft_model_state_dict(model).items() if not key.endswith(BLOCK)},
    )


def _config(base: Any, fields: dict[str, Any]) -> BoneConfig:
    """As `flashbone train` would have it."""
    layers = [name for name in ("layers_to_transform", "layers_pattern") if fields.get(name) is not None]
    if layers and "target_modules" not in fields:
        raise ConfigError(
            f"adapter: {' and '.join(layers)} without target_modules, which is then all-linear, in every layer; name"
            " the modules in a list, such as target_modules [q_proj, v_proj]"
        )
    fields = {"target_modules": "all-linear", **without_empty_kind(fields)}
    if _has_classifier(base):
        fields.setdefault("task_type", "SEQ_CLS")  # PEFT then trains the classifier, too
    try:
        return BoneConfig(**fields)
    except TypeError as error:
        raise ConfigError(f"adapter: {error}") from error


def _has_classifier(base: nn.Module) -> bool:
    return type(base).__name__.endswith("ForSequenceClassification")


def _adapted(base: Any, config: BoneConfig) -> PeftModel:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about training and saving
            return get_peft_model(base, config, ADAPTER)  # pyright: ignore[reportArgumentType, reportReturnType]
    except FlashboneError:
        raise
    except (ValueError, TypeError, re.error) as error:  # from PEFT, over fields that BoneConfig does not check
        raise ConfigError(f"adapter: {' '.join(str(error).split())}") from error


def _check_kinds(layers: dict[str, BoneLayer]) -> None:
    """Only costs of layers that multiply each token with a matrix are counted."""
    others = {n: m for n, m in layers.items() if isinstance(m, (BoneConv, BoneEmbedding, ParamWrapper))}
    if others:
        names = ", ".join(own_name(n, m, [*others]) for n, m in others.items())
        raise ConfigError(
            f"adapter: {names}: inspect counts what linear layers cost, and no convolutions, embeddings or"
            " target_parameters; leave them out"
        )


def _plain(name: str) -> str:
    """The name of a parameter of the adapted model in the base."""
    return bare(re.sub(rf"\.modules_to_save\.{ADAPTER}(?=\.)", "", name.removeprefix(ROOT)))


def _quantisation(config: PretrainedConfig) -> str | None:
    quantised = getattr(config, "quantization_config", None)
    if not quantised:
        return None
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown")
