"""Counting what trains: a method is attached to a copy of the model without weights, and PEFT's own tensors counted."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from flashbone.compare.attaching import attach, count_trained, tuner_layers
from flashbone.compare.methods import Settings, TrainingMethod
from flashbone.tuner.model.presets import parameter_count


@dataclass(frozen=True)
class ParameterCount:
    """What a method trains at a size: `settings` choose it, `words` describe it, `layers` has the number of each
    adapted layer by its name; the others are as in `MethodSize`."""

    settings: dict[str, Any]
    words: str
    adapter: int
    trainable: int
    total: int
    layers: dict[str, int]


class ParameterCounter:
    """Counts one method on one model, at any size.

    Args:
        method: One of `METHODS`.
        model: Stays as it is; only names and shapes are used. Not quantised; the skeleton of a model will do.
        target_modules: As PEFT takes them.
        task_type: "CAUSAL_LM" or "SEQ_CLS".
        settings: The user's fields of the configuration.
    """

    def __init__(
        self,
        method: TrainingMethod,
        model: nn.Module,
        target_modules: list[str] | str | None,
        task_type: str | None,
        settings: Settings,
    ) -> None:
        self.method, self.model = method, model
        self._config = (target_modules, task_type, settings)
        self._base = parameter_count(model)
        self._counts: dict[str, ParameterCount] = {}

    def __call__(self, size: Settings) -> ParameterCount:
        """The numbers at this size.

        Raises:
            ConfigError: the method cannot be attached at this size.
        """
        key = json.dumps(size, sort_keys=True)
        if key not in self._counts:
            model, words = self._attached(size)
            adapter, trainable = count_trained(model, self.method)
            layers = {} if self.method.is_bound else _layer_counts(model)
            total = parameter_count(model) if self.method.is_bound else self._base + adapter
            self._counts[key] = ParameterCount(dict(size), words, adapter, trainable, total, layers)
        return self._counts[key]

    def layers(self) -> list[Any]:
        """The adapted layers, which are the same at all sizes.

        Raises:
            ConfigError: the method cannot be attached to this model, or adapts nothing.
        """
        return [layer for _, layer in tuner_layers(self._attached({self.method.size_fields[0]: 1})[0])]

    def _attached(self, size: Settings) -> tuple[Any, str]:
        """A copy of the model on the meta device with the method, and the size in words."""
        from peft.tuners.boft.layer import BOFTLayer

        config = self.method.config(size, *self._config)
        if isinstance(getattr(config, "init_lora_weights", None), str):
            config.init_lora_weights = True  # to decompose no weights takes as long as to decompose some
        # BOFT writes permutations entry by entry, which the meta device cannot; only their shape is needed.
        no_entries = patch.object(BOFTLayer, "perm2mat", lambda self, indices: torch.zeros(2 * (len(indices),)))
        with torch.device("meta"), torch.random.fork_rng(devices=()), no_entries:
            model = attach(meta_copy(self.model), self.method, config, 0)
        return model, self.method.size_words if config is None else self.method.describe(config)


def meta_copy(model: Any) -> Any:
    """A copy of a model whose tensors are on the meta device; ties between them stay."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


def _layer_counts(model: Any) -> dict[str, int]:
    prefix = model.base_model.prefix
    return {
        name: sum(p.numel() for key, p in layer.named_parameters() if p.requires_grad and prefix in key)
        for name, layer in tuner_layers(model)
    }
