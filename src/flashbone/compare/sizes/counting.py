"""Counting what trains: a method is attached to a copy of the model without weights, and PEFT's own tensors counted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flashbone.compare.methods.attaching import find_heads, named, train_all, train_head, tuner_layers, with_adapter
from flashbone.compare.methods.registry import Method, Size
from flashbone.errors import FlashboneError
from flashbone.tuner.model.presets import parameter_count


@dataclass(frozen=True)
class Layer:
    """An adapted layer: its name in the base, and its sizes."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Count:
    """Numbers of parameters.

    Attributes:
        adapter: those of the adapter that train; of a bound, what trains besides a classification head.
        trainable: all that train: the adapter, a new head, biases.
        total: the model's and the adapter's, frozen random matrices of the adapter aside.
        layers: the adapted layers.
    """

    adapter: int
    trainable: int
    total: int
    layers: tuple[Layer, ...]


class Counter:
    """Counts one method on one model, for any size.

    Args:
        method: Of `METHODS`.
        build_model: Makes the model; a skeleton on the meta device will do. It is called once; its tensors are let go.
        target_modules: As `Method.config` takes it.
        task_type: As `Method.config` takes it.
        settings: The user's own.
    """

    def __init__(
        self,
        method: Method,
        build_model: Callable[[], Any],
        target_modules: list[str] | str | None,
        task_type: str | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.method = method
        self.model = meta_copy(build_model())
        self.target_modules, self.task_type, self.settings = target_modules, task_type, dict(settings)

    def layers(self) -> tuple[Layer, ...]:
        """The layers that the method adapts, which its size does not change.

        Raises:
            ConfigError: it cannot be attached, or adapts nothing.
        """
        probes = {"oft": {"r": 1, "oft_block_size": 0}, "boft": {"boft_block_num": 1, "boft_block_size": 0}}
        return self(probes.get(self.method.name, {"r": 2})).layers

    def __call__(self, size: Size) -> Count:
        """The numbers at this size.

        Raises:
            ConfigError: the method cannot be attached at this size.
        """
        base = parameter_count(self.model)
        model = meta_copy(self.model)
        try:
            if self.method.is_bound:
                return _count_bound(model, self.method, base)
            config: Any = self.method.config(size, self.target_modules, self.task_type, self.settings)
            if str(getattr(config, "init_lora_weights", "")).startswith("pissa"):
                config.init_lora_weights = True  # a decomposition of nothing takes as long as one
            with torch.device("meta"), _plain_permutations(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The symmetric initialization can NOT be performed")  # HRA, odd r
                attached = with_adapter(model, self.method, config)
        except FlashboneError as error:
            raise named(self.method, error) from error
        trained = {name: p.numel() for name, p in attached.named_parameters() if p.requires_grad}
        prefix = attached.base_model.prefix
        adapter = sum(number for name, number in trained.items() if prefix in name)
        layers = [Layer(name, *_sizes(module)) for name, module in tuner_layers(attached)]
        return Count(adapter, sum(trained.values()), base + adapter, tuple(layers))


def meta_copy(model: Any) -> Any:
    """A copy of a model whose tensors are on the meta device; ties between them stay."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


def _count_bound(model: Any, method: Method, base: int) -> Count:
    trained = train_all(model) if method.name == "full" else train_head(model)
    numbers = {name: p.numel() for name, p in trained.named_parameters() if p.requires_grad}
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    heads = {id(p) for head in find_heads(model) for p in head.parameters()} if classifies else set()
    inside = sum(p.numel() for p in trained.parameters() if p.requires_grad and id(p) not in heads)
    return Count(inside, sum(numbers.values()), parameter_count(trained), ())


def _sizes(layer: Any) -> tuple[int, int]:
    return int(layer.out_features), int(layer.in_features)


@contextmanager
def _plain_permutations() -> Iterator[None]:
    """BOFT writes its permutations into dense matrices, entry by entry; only their shape is wanted here."""
    from peft.tuners.boft.layer import BOFTLayer

    original = BOFTLayer.perm2mat
    BOFTLayer.perm2mat = lambda self, indices: torch.zeros((len(indices), len(indices)))
    try:
        yield
    finally:
        BOFTLayer.perm2mat = original
