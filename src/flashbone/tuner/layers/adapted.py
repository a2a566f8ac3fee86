"""What a layer with adapters holds, for the modules that `BoneLayer` is built from."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flashbone import variants
from flashbone.errors import ConfigError
from flashbone.tuner.layers import calls, offloading
from flashbone.tuner.layers.calls import CURRENT
from flashbone.tuner.layers.kinds import BaseKind
from flashbone.tuner.layers.mixed_batch import RowNames
from flashbone.variants.merged import Term


class AdaptedLayer(BaseTunerLayer):
    """The adapters of one layer, and those that a call uses."""

    base_layer: nn.Module
    training: bool
    base_kind: BaseKind
    bone_r: dict[str, int]
    bone_variant: dict[str, variants.Variant]
    bone_scale: dict[str, float]
    bone_dropout: nn.ModuleDict
    bone_block: nn.ParameterDict
    turn: calls.Turn
    _merged_as: dict[str, Term]  # merged adapters as they were merged; blocks and scales may change afterwards

    def get_base_layer(self) -> nn.Module:
        """The adapted layer itself, under the adapters of all methods. PEFT's own asks each module for an attribute
        that the last one lacks, which costs a decoding step as much as a small product."""
        layer: Any = self
        while (inner := layer._modules.get("base_layer")) is not None:
            layer = inner
        return layer

    def base_parameter(self) -> Any:
        """The adapted parameter of the base, as the base stores it."""
        return self.base_kind.parameter(self.get_base_layer())

    def active_here(self) -> list[str]:
        """Names of the active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.bone_block]

    def block_of(self, name: str) -> Tensor:
        """The adapter's block, whole, for autograd."""
        # ParameterDict's own look-up is a chain of Python calls that shows in decoding.
        block: Any = cast(Any, self)._modules["bone_block"]._parameters.get(name)
        return (
            block
            if offloading.is_materialized(block)
            else offloading.for_autograd(self.bone_block, name, cast(nn.Module, self))
        )

    @property
    def row_names(self) -> RowNames | None:
        """The adapter of each row, while this thread calls the model with `adapter_names`. PEFT passes names by a hook
        on every layer, which costs more than the adapters in a decoding step."""
        rows = CURRENT.rows
        if rows is not None and rows.has_grad and not torch.compiler.is_compiling():
            calls.check_not_checkpointed()
        return rows

    def check_rows(self) -> None:
        """Raises a ConfigError where a batch cannot have an adapter for each row."""
        if self.training:
            raise ConfigError("adapter_names: the layer is in training mode; call eval() first")
        if self.merged_adapters:
            raise ConfigError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first")
